"""docs/seams.md lists what the product touches of vLLM, and all of it exists in the installed vLLM."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, files_and_folders, table_rows

PAGE = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
PRODUCT = ("vllm_sparq", "attention_backends", "scheduler")

BY_ANOTHER_WORD = {"SchedulerOutput": "output"}
"""Class -> what our files call its instances, where they never name it."""


def seams() -> list[tuple[str, str]]:
    """(name of vLLM's, cell with our files) of every row."""
    rows = [(cells[0].strip("`"), cells[1]) for cells in table_rows(PAGE)]
    assert len(rows) > 40
    return rows


@cache
def parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} does not exist in the installed vLLM"
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def defined(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements define, those under `if` and `try` too."""
    for statement in body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement.name, statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, statement) for alias in statement.names)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from ((target.id, statement) for target in targets if isinstance(target, ast.Name))
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from defined([*statement.body, *statement.orelse])


def has_member(cls: ast.ClassDef, name: str) -> bool:
    """Whether the source of a class defines a member, or sets an attribute of ``self``."""
    if any(name == found for found, _ in defined(cls.body)):
        return True
    stores = (node for node in ast.walk(cls) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return any(node.attr == name and isinstance(node.value, ast.Name) and node.value.id == "self" for node in stores)


@cache
def is_module(name: str) -> bool:
    """Whether vLLM has a module of that name, a file or a package."""
    if not name:
        return False
    try:
        parsed(name)
    except (ImportError, AssertionError):
        return False
    return True


def exists(seam: str) -> bool:
    """``module:name`` or ``module:Class.member``, by the source: nothing is imported, so CUDA's modules can be read."""
    module, _, path = seam.partition(":")
    name, _, member = path.partition(".")
    found = dict(defined(parsed(module).body))
    lazily = name in ast.unparse(parsed(module))  # a package whose `__getattr__` imports what it is asked for
    if name not in found and not lazily:
        return not member and is_module(f"{module}.{name}")
    if not member:
        return True
    cls = found.get(name)
    return isinstance(cls, ast.ClassDef) and has_member(cls, member)


@pytest.mark.parametrize(("seam", "ours"), seams(), ids=[seam for seam, _ in seams()])
def test_what_we_touch_exists(seam: str, ours: str) -> None:
    assert exists(seam), f"the installed vLLM has no {seam}: see docs/seams.md for what depends on it"
    files = re.findall(r"`([^`]+)`", ours)
    assert files
    last = re.split(r"[:.]", seam)[-1]
    word = BY_ANOTHER_WORD.get(last, last)
    for file in files:
        assert file in files_and_folders(), f"{file} does not exist"
        assert word in (ROOT / file).read_text(encoding="utf-8"), f"{file} says nothing of {last}"


def imported() -> set[str]:
    """``module:name`` of everything that the product imports from vLLM."""
    found = set()
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def read_of_modules() -> set[str]:
    """``module:name`` of what the product reads from modules of vLLM that it imports as modules."""
    found = set()
    for path in [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vllm.")]
        names = {a.asname or a.name: f"{n.module}.{a.name}" for n in imports for a in n.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id.islower():
                found.add(f"{names.get(node.value.id, '')}:{node.attr}")
    return {name for name in found if is_module(name.partition(":")[0])}


def test_what_is_read_of_modules_exists() -> None:
    names = read_of_modules()
    assert "vllm.v1.core.kv_cache_utils:get_kv_cache_capacity" in names
    missing = {name for name in names if not exists(name)}
    assert not missing, f"the installed vLLM has no {sorted(missing)}"


def test_what_is_imported_is_listed() -> None:
    names = imported()
    assert len(names) > 20
    listed = {re.sub(r"(:[^.]*).*", r"\1", seam) for seam, _ in seams()}  # without the member of a class
    missing = names - listed
    assert not missing, f"docs/seams.md says nothing of {sorted(missing)}"


def test_what_is_extended_is_listed() -> None:
    """Methods that the vLLM side of the product overrides and calls on."""
    extended = set()
    for path in [path for folder in ("attention_backends", "scheduler") for path in (ROOT / folder).rglob("*.py")]:
        extended |= set(re.findall(r"super\(\)\.(\w+)", path.read_text(encoding="utf-8")))
    assert len(extended) > 5
    missing = extended - {re.split(r"[:.]", seam)[-1] for seam, _ in seams()} - {"__init__"}
    assert not missing, f"docs/seams.md says nothing of {sorted(missing)}"


def test_what_does_not_exist_is_found_out() -> None:
    registry = "vllm.v1.kv_cache_spec_registry"
    assert exists(f"{registry}:KVCacheSpecRegistry.register")
    assert not exists(f"{registry}:KVCacheSpecRegistry.no_such_method")
    assert not exists(f"{registry}:NoSuchClass")
    with pytest.raises(AssertionError, match="does not exist"):
        exists("vllm.v1.no_such_module:Name")
