"""Who may import whom, by reading the source of every file and by asking fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FOLDERS = {
    "vllm_sparq": "vllm_sparq",
    "attention_backends": "vllm_sparq.attention_backends",
    "scheduler": "vllm_sparq.scheduler",
    "benchmarks": "vllm_sparq.benchmarks",
}
"""Folder -> the package it installs as."""

MAX_LINES = 400

CORE = tuple(f"vllm_sparq.{name}" for name in ("retention", "formats", "backends", "reads", "config", "layout"))
"""Numbers without vLLM, from the ground up: each may import those before it."""

MAY_IMPORT_OF_OURS = {
    "vllm_sparq": (),
    **{name: CORE[:i] for i, name in enumerate(CORE)},
    "vllm_sparq.reads": ("vllm_sparq.formats", "vllm_sparq.reads", "vllm_sparq.config", "vllm_sparq.layout"),
    "vllm_sparq.ops": (*CORE, "vllm_sparq.ops"),
    "vllm_sparq.console": (*CORE, "vllm_sparq.models"),
    "vllm_sparq.models": ("vllm_sparq.models", "vllm_sparq.console"),
}
"""Package -> all that it may import of this project; packages without a row follow the other rules only."""

MAY_NOT_IMPORT_OF_OURS = {"vllm_sparq.scheduler": ("vllm_sparq.ops",)}

MAY_IMPORT_VLLM = (
    "vllm_sparq.plugin",
    "vllm_sparq.platform",
    "vllm_sparq.compat",
    "vllm_sparq.cli",
    "vllm_sparq.doctor",
    "vllm_sparq.stat_logger",
    "vllm_sparq.attention_backends",
    "vllm_sparq.scheduler",
    "vllm_sparq.benchmarks",
)

LAZY = {
    **{
        f"vllm_sparq.reads.{name}": ("vllm_sparq.config", "vllm_sparq.layout")
        for name in ("base", "sparq", "spans", "infllm")
    },
    "vllm_sparq.cli": ("vllm", "torch", "triton", "vllm_sparq.benchmarks", "vllm_sparq.ops"),
    "vllm_sparq.console": ("vllm", "torch", "triton", "rich", "vllm_sparq.models", *CORE),
    **{f"vllm_sparq.models.{name}": ("torch", "transformers", "gguf") for name in ("convert", "folders", "command")},
    "vllm_sparq.plugin": ("vllm", "torch", "triton"),
    "vllm_sparq.compat": ("vllm", "torch", "triton"),
    **{f"vllm_sparq.doctor.{name}": ("vllm",) for name in ("command", "machine", "model", "engine")},
    "vllm_sparq.ops.dispatch": ("triton",),
}
"""Module -> what it may import inside functions only."""

MAY_IMPORT_BENCHMARKS = ("vllm_sparq.cli", "vllm_sparq.benchmarks")


@dataclass(frozen=True)
class Import:
    """``name`` is imported by ``module``; ``lazy`` where that happens inside a function or for type checkers."""

    module: str
    name: str
    lazy: bool
    where: str


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def sources() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), path


def imports_of(module: str, path: Path, source: str) -> Iterator[Import]:
    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, lazy, where)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield Import(module, base, lazy, where)
            for alias in node.names:  # a name may be a module: `from vllm_sparq import config`
                if base.partition(".")[0] == "vllm_sparq":
                    yield Import(module, f"{base}.{alias.name}", lazy, where)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(module, argument.value, lazy, where)
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or is_function or for_types)

    return visit(ast.parse(source, str(path)), lazy=False)


@cache
def all_imports() -> list[Import]:
    return [i for module, path in sources() for i in imports_of(module, path.relative_to(ROOT), path.read_text())]


def violations(imports: list[Import]) -> list[str]:
    """Each broken rule in words."""
    found = []

    def refuse(one: Import, rule: str) -> None:
        found.append(f"{one.where}: {one.module} imports {one.name}: {rule}")

    for one in imports:
        if inside(one.name, "vllm_sparq") and one.name != "vllm_sparq":
            owners = [package for package in MAY_IMPORT_OF_OURS if inside(one.module, package)]
            allowed = MAY_IMPORT_OF_OURS[max(owners, key=len)]
            owner = max(owners, key=len)
            if (owner != "vllm_sparq" or one.module == "vllm_sparq") and not inside(one.name, *allowed):
                refuse(one, f"{owner} may import only {list(allowed)} of ours")
            for package, refused in MAY_NOT_IMPORT_OF_OURS.items():
                if inside(one.module, package) and inside(one.name, *refused):
                    refuse(one, f"{package} never imports {list(refused)}")
            if inside(one.name, "vllm_sparq.benchmarks") and not inside(one.module, *MAY_IMPORT_BENCHMARKS):
                refuse(one, f"only {list(MAY_IMPORT_BENCHMARKS)} import benchmarks")
            if inside(one.name, "vllm_sparq.cli") and one.module != "vllm_sparq.cli":
                refuse(one, "nothing below the command line imports it: use vllm_sparq.console")
        if inside(one.name, "vllm") and not inside(one.module, *MAY_IMPORT_VLLM):
            refuse(one, f"only {list(MAY_IMPORT_VLLM)} import vLLM")
        for module, names in LAZY.items():
            if one.module == module and not one.lazy and inside(one.name, *names):
                refuse(one, "only inside functions")
        if inside(one.name, *(folder for folder in FOLDERS if folder != "vllm_sparq")):
            refuse(one, f"import it as {FOLDERS[one.name.partition('.')[0]]}")
        if inside(one.name, "tests"):
            refuse(one, "tests are not installed")
    return found


def circles(imports: list[Import]) -> list[list[str]]:
    """Modules that need each other when they are loaded, each circle once."""
    modules = {one.module for one in imports}
    needs: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports:
        if not one.lazy and one.name in modules and one.name != one.module:
            needs[one.module].add(one.name)
    found = []
    while needs:
        free = {module for module, wanted in needs.items() if not wanted & needs.keys()}
        if not free:
            module, path = min(needs), list[str]()
            while module not in path:
                path.append(module)
                module = min(needs[module] & needs.keys())
            found.append(path[path.index(module) :])
            free = set(found[-1])
        needs = {module: wanted for module, wanted in needs.items() if module not in free}
    return found


def test_no_module_needs_itself() -> None:
    assert circles(all_imports()) == []


def test_a_circle_is_found() -> None:
    pairs = (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "x"))
    imports = [Import(module, name, lazy=False, where="") for module, name in pairs]
    assert circles(imports) == [["a", "b", "c"]]
    assert circles([replace(one, lazy=one.module == "c") for one in imports]) == []


def test_import_rules() -> None:
    broken = violations(all_imports())
    assert not broken, "\n".join(broken)
    assert {"vllm_sparq.config", "vllm_sparq.layout", "vllm_sparq.ops.dispatch"} <= {i.module for i in all_imports()}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_sparq", "import vllm_sparq.config"),
        ("vllm_sparq.config", "from vllm_sparq.ops import dispatch"),
        ("vllm_sparq.layout", "from vllm_sparq import plugin"),
        ("vllm_sparq.layout", "from . import plugin"),
        ("vllm_sparq.config", "from vllm_sparq.layout import PageLayout"),
        ("vllm_sparq.reads.base", "from vllm_sparq.config import Options"),
        ("vllm_sparq.ops.write", "def f():\n    import vllm"),
        ("vllm_sparq.ops.write.cpu", "from ...scheduler import spec"),
        ("vllm_sparq.ops.write.cpu", "import importlib\nimportlib.import_module('vllm.config')"),
        ("vllm_sparq.config", "import vllm.config"),
        ("vllm_sparq.scheduler.spec", "from vllm_sparq.ops.write import write"),
        ("vllm_sparq.scheduler.spec", "from vllm_sparq.benchmarks import tasks"),
        ("vllm_sparq.attention_backends.impl", "from vllm_sparq import benchmarks"),
        ("vllm_sparq.cli", "import vllm"),
        ("vllm_sparq.doctor", "from vllm_sparq.cli import main"),
        ("vllm_sparq.benchmarks.engine.bench", "def f():\n    from vllm_sparq import cli"),
        ("vllm_sparq.console", "from vllm_sparq.benchmarks.tiny_model import WEIGHTS"),
        ("vllm_sparq.console", "import rich.console"),
        ("vllm_sparq.plugin", "if True:\n    import torch"),
        ("vllm_sparq.attention_backends.impl", "from scheduler import spec"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str) -> None:
    assert len(violations(list(imports_of(module, Path("x.py"), source)))) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vllm_sparq.layout", "import torch\nfrom vllm_sparq.config import Options"),
        ("vllm_sparq.reads.base", "if TYPE_CHECKING:\n    from vllm_sparq.config import Options"),
        ("vllm_sparq.ops.write.cpu", "from vllm_sparq.ops import native\nfrom vllm_sparq.layout import Pages"),
        ("vllm_sparq.cli", "def main():\n    import vllm\n    from vllm_sparq.benchmarks import tasks"),
        ("vllm_sparq.plugin", "from vllm_sparq import compat\ndef register():\n    import vllm"),
        ("vllm_sparq.benchmarks.tasks.generated", "from vllm_sparq.benchmarks import report\nimport vllm"),
        ("vllm_sparq.attention_backends.impl", "from vllm_sparq.ops import dispatch\nimport vllm"),
    ],
)
def test_what_is_allowed_is_not_found(module: str, source: str) -> None:
    assert violations(list(imports_of(module, Path("x.py"), source))) == []


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = (
    "import sys; print(sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'vllm', 'triton', 'pydantic'}))"
)


@pytest.mark.parametrize(
    ("module", "loads"),
    [
        ("vllm_sparq", "[]"),
        ("vllm_sparq.config", "['pydantic']"),
        ("vllm_sparq.compat", "[]"),
        ("vllm_sparq.plugin", "[]"),
    ],
)
def test_what_an_import_loads(module: str, loads: str) -> None:
    assert in_a_fresh_process(f"import {module}; {LOADED}") == loads


def test_ops_do_not_load_vllm() -> None:
    """All modules of ops at once, kernels included where their libraries are installed."""
    modules = [m for m, _ in sources() if inside(m, "vllm_sparq.ops", "vllm_sparq.layout")]
    code = f"""
import importlib, importlib.util, sys
for module in {modules!r}:
    if "triton" not in module or importlib.util.find_spec("triton"):
        importlib.import_module(module)
print(sorted(m for m in sys.modules if m == "vllm" or m.startswith("vllm.")))
"""
    assert in_a_fresh_process(code) == "[]"


def test_choosing_an_op_loads_no_triton_on_cpu() -> None:
    code = f"from vllm_sparq.ops.dispatch import choose; choose('write', 'cpu').load(); {LOADED}"
    assert "triton" not in in_a_fresh_process(code)


def test_files_stay_readable() -> None:
    """No file beyond the ceiling of lines: split it by what changes together."""
    files = [
        path
        for folder in (*FOLDERS, "tests")
        for suffix in ("py", "cpp", "h")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    assert len(files) > 20
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in [*files, ROOT / "setup.py"]}
    long = [f"{path}: {lines} lines, {MAX_LINES} are allowed" for path, lines in lengths.items() if lines > MAX_LINES]
    assert not long, "\n".join(long)
