"""docs/promises.md names a test for every promise, and each exists; one of them at least is run at every push."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.commands import made_by_ci
from tests.docs.markdown import ROOT, documents, table_rows

PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NIGHTLY = "*nightly*"
"""What rows say that no test of `make unit` proves."""

NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_of(file: str) -> dict[str, frozenset[str]]:
    """Test functions of a file, those of classes too -> their marks and the file's; none if there is no such file.

    A mark of some cases of a test is none of the test's.
    """
    path = ROOT / file
    if not path.is_file():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_file = {
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value))
    }
    return {
        node.name: frozenset(of_file.union(m.attr for m in node.decorator_list if isinstance(m, ast.Attribute)))
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


def is_run_at_every_push(file: str, name: str) -> bool:
    """Whether `make unit` has it; what is inside tests/cuda is run by a test there."""
    return functions_of(file)[name].isdisjoint({"long", "real"})


def wrongly_nightly(rows: list[list[str]]) -> list[str]:
    """Promises that no test of `make unit` proves and that do not say so, or that say so and have one."""
    wrong = []
    for cells in rows:
        is_run = any(is_run_at_every_push(file, name) for file, name in NODE.findall(cells[1]))
        if is_run == (NIGHTLY in "".join(cells)):
            wrong.append(cells[0])
    return wrong


def missing(text: str) -> list[str]:
    """Node ids that stand in a text and do not exist."""
    return [f"{file}::{name}" for file, name in NODE.findall(text) if name not in functions_of(file)]


def test_every_promise_names_a_test() -> None:
    rows = list(table_rows(PROMISES))
    assert len(rows) > 25
    bare = [cells[0] for cells in rows if not NODE.search(cells[1])]
    assert not bare, f"promises without a test: {bare}"


def test_what_is_proven_at_night_alone_is_called_so() -> None:
    wrong = wrongly_nightly(list(table_rows(PROMISES)))
    assert not wrong, f"rows of docs/promises.md with {NIGHTLY}, or without it, and wrongly so: {wrong}"
    assert NIGHTLY in PROMISES.split("\n## ")[0], "the word is not explained"


@pytest.mark.parametrize("target", ["test-long", "real"])
def test_ci_runs_it_at_night(target: str) -> None:
    assert target in made_by_ci("schedule")
    assert target not in made_by_ci("push")
    assert f"`make {target}`" in PROMISES.split("\n## ")[0]


def test_a_promise_without_its_word_is_found() -> None:
    here, long = "tests/docs/test_promises.py", "tests/docs/test_examples.py"
    by_day = ["a", f"`{here}::test_a_promise_without_its_word_is_found`", "all"]
    by_night = ["b", f"`{long}::test_serve`", "all"]
    assert not wrongly_nightly([by_day, [*by_night, NIGHTLY], [*by_day, by_night[1]]])
    assert wrongly_nightly([[*by_day, NIGHTLY], by_night]) == ["a", "b"]
    everything = ["c", "`tests/benchmarks/test_killed_commands.py::test_whoever_is_killed`"]
    assert wrongly_nightly([everything]) == ["c"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_exists(path: Path) -> None:
    assert not missing(path.read_text(encoding="utf-8"))


def test_a_test_that_is_gone_is_missed() -> None:
    here = "tests/docs/test_promises.py"
    assert missing(f"`{here}::test_a_test_that_is_gone_is_missed` `{here}::test_nothing`") == [f"{here}::test_nothing"]
    assert missing("`tests/no_such_file.py::test_x`") == ["tests/no_such_file.py::test_x"]
