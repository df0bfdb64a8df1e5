"""docs/promises.md names a test for every promise, and each exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, documents, table_rows

NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the test functions of a file, those of classes too; none if there is no such file."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(
        node.name
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    )


def missing(text: str) -> list[str]:
    """Node ids that stand in a text and do not exist."""
    return [f"{file}::{name}" for file, name in NODE.findall(text) if name not in functions_of(file)]


def test_every_promise_names_a_test() -> None:
    rows = list(table_rows((ROOT / "docs" / "promises.md").read_text(encoding="utf-8")))
    assert len(rows) > 25
    bare = [cells[0] for cells in rows if not NODE.search(cells[1])]
    assert not bare, f"promises without a test: {bare}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_exists(path: Path) -> None:
    assert not missing(path.read_text(encoding="utf-8"))


def test_a_test_that_is_gone_is_missed() -> None:
    here = "tests/docs/test_promises.py"
    assert missing(f"`{here}::test_a_test_that_is_gone_is_missed` `{here}::test_nothing`") == [f"{here}::test_nothing"]
    assert missing("`tests/no_such_file.py::test_x`") == ["tests/no_such_file.py::test_x"]
