"""Shapes that the code must keep: state belongs to an engine, and a choice of an axis is asked of its object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import inside, sources

STATELESS = ("vllm_sparq.attention_backends", "vllm_sparq.scheduler")
"""Several engines may live in one process, so nothing here remembers one outside of its objects."""

MUTATORS = {"append", "extend", "add", "update", "insert", "pop", "remove", "clear", "setdefault", "discard"}

IMMUTABLE = {"init_logger", "TypeVar", "range", "tuple", "frozenset", "field", "ClassVar"}
"""What may be called for the value of a name in a module or a class: what it gives cannot be changed."""

VLLM_ASKS = {"supported_dtypes", "supported_kv_cache_dtypes"}
"""Lists in a class that are vLLM's interface."""

DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp, ast.Lambda)

READ_CLASSES = {"SparqRead", "SpansRead", "InfllmRead", "DenseRead"}
KNOW_READS = ("vllm_sparq.reads", "vllm_sparq.ops", "vllm_sparq.benchmarks.ops", "vllm_sparq.benchmarks.simulation")
"""Reads themselves, the ops that they call, and what measures one op or simulates one method."""


def state_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that keep something in a module: ``global``, another module's attribute, a constant that is changed."""
    modules = {alias.asname or alias.name for node in tree.body for alias in _modules_of(node)}
    constants = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []:
            owner = getattr(target, "value", None)
            if isinstance(target, ast.Attribute) and isinstance(owner, ast.Name) and owner.id in modules:
                yield node.lineno, f"{owner.id}.{target.attr} is set"
            if isinstance(target, ast.Subscript) and isinstance(owner, ast.Name) and owner.id in constants:
                yield node.lineno, f"{owner.id} is changed"
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in MUTATORS:
            owner = called.value
            if isinstance(owner, ast.Name) and owner.id in constants:
                yield node.lineno, f"{owner.id} is changed"


def mutables_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that put something into a module or a class that could be changed there, and those that set it."""
    for body in [tree.body, *[node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]]:
        for node in body:
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            name = ast.unparse(node).partition("=")[0].partition(":")[0].strip()
            called = getattr(getattr(value, "func", None), "id", "") if isinstance(value, ast.Call) else None
            if name not in VLLM_ASKS and (isinstance(value, DISPLAYS) or called not in (None, *IMMUTABLE)):
                yield node.lineno, ast.unparse(node)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | {"cls"}
    classes |= {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []:
            owner = getattr(target, "value", None)
            if isinstance(target, ast.Attribute) and (getattr(owner, "id", "") in classes or _is_type_of(owner)):
                yield node.lineno, f"{ast.unparse(target)} is set"
        is_set = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr"
        if is_set and (getattr(node.args[0], "id", "") in classes or _is_type_of(node.args[0])):
            yield node.lineno, ast.unparse(node)


def _is_type_of(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "type"


def _modules_of(node: ast.stmt) -> list[ast.alias]:
    """Names that may be modules: of ``import x``, and lower-case ones of ``from package import x``."""
    if isinstance(node, ast.Import):
        return node.names
    return [alias for alias in node.names if alias.name.islower()] if isinstance(node, ast.ImportFrom) else []


def branches_on_reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that ask which read there is: ``.read == ...`` or ``isinstance(read, SparqRead)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = [side.attr for side in sides if isinstance(side, ast.Attribute)]
            if "read" in names and any(isinstance(side, ast.Constant) for side in sides):
                yield node.lineno, ast.unparse(node)
        is_check = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if is_check and READ_CLASSES & {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}:
            yield node.lineno, ast.unparse(node)


def found_in(path: Path, rule: str) -> list[str]:
    check = {"state": state_of, "mutables": mutables_of, "reads": branches_on_reads}[rule]
    return [f"{path.name}:{line}: {text}" for line, text in check(ast.parse(path.read_text()))]


def test_no_state_outside_an_engine() -> None:
    found = [line for module, path in sources() if inside(module, *STATELESS) for line in found_in(path, "state")]
    assert not found, "\n".join(found)


def test_nothing_that_could_be_changed_belongs_to_a_module() -> None:
    found = [line for module, path in sources() if inside(module, *STATELESS) for line in found_in(path, "mutables")]
    assert not found, "\n".join(found)


def test_nobody_asks_which_read_it_is() -> None:
    others = [path for module, path in sources() if not inside(module, *KNOW_READS)]
    found = [line for path in others for line in found_in(path, "reads")]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("def f():\n    global x\n    x = 1", "state"),
        ("from vllm_sparq.steps import builder\ndef f():\n    builder.lengths = 1", "state"),
        ("KNOWN = {}\ndef f():\n    KNOWN['x'] = 1", "state"),
        ("KNOWN: list[int] = []\ndef f():\n    KNOWN.append(1)", "state"),
        ("KNOWN = {}", "mutables"),
        ("known: dict[str, int] = dict()", "mutables"),
        ("from threading import local\n_active = local()", "mutables"),
        ("SEEN = [n for n in range(3)]", "mutables"),
        ("class A:\n    engines: ClassVar[list[int]] = []", "mutables"),
        ("class A:\n    @classmethod\n    def f(cls):\n        cls.last = 1", "mutables"),
        ("class A:\n    def f(self):\n        type(self).last = 1", "mutables"),
        ("from vllm import Engine\ndef f():\n    Engine.ours = 1", "mutables"),
        ("from vllm import Engine\ndef f():\n    setattr(Engine, 'ours', 1)", "mutables"),
        ("def f(options):\n    return options.read == 'sparq'", "reads"),
        ("def f(read):\n    return isinstance(read, (int, SpansRead))", "reads"),
    ],
)
def test_a_broken_shape_is_found(source: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(source)
    assert len(found_in(tmp_path / "x.py", rule)) == 1
