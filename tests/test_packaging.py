"""What a wheel holds, and what installing it touches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_imports import ROOT, sources
from vllm_sparq.ops.instruction_sets import of_machine


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[zipfile.ZipFile, str]:
    """A wheel built from the files git knows, where no compiler is found; and what the build said."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), "."],
        cwd=source,
        env={**os.environ, "PATH": str(folder), "CXX": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel), built.stdout + built.stderr


def test_wheel_holds_only_our_package(wheel_without_compiler: tuple[zipfile.ZipFile, str]) -> None:
    names = wheel_without_compiler[0].namelist()
    assert all(re.match(r"vllm_sparq(/|-[^/]+\.dist-info/)", name) for name in names), names
    assert {"vllm_sparq/benchmarks/tiny_model/weights/model.safetensors", "vllm_sparq/py.typed"} <= set(names)


def test_wheel_holds_every_module(wheel_without_compiler: tuple[zipfile.ZipFile, str]) -> None:
    """An editable install, as the one that runs this, finds a package that pyproject.toml forgot all the same."""
    modules = {name.replace(".", "/") for name, _ in sources()}
    files = {
        re.sub(r"(/__init__)?\.py$", "", name) for name in wheel_without_compiler[0].namelist() if name.endswith(".py")
    }
    assert files == modules


def test_installing_does_not_ask_for_torch(wheel_without_compiler: tuple[zipfile.ZipFile, str]) -> None:
    """vLLM brings the torch it was built for; asking for another would replace it."""
    wheel, _ = wheel_without_compiler
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    lines = wheel.read(name).decode().splitlines()
    wanted = [line.split()[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    required = {re.split(r"[^\w-]", requirement)[0] for requirement in wanted}
    assert required == {"vllm", "packaging", "pydantic", "rich"}


def test_without_a_compiler_the_build_says_what_it_costs(wheel_without_compiler: tuple[zipfile.ZipFile, str]) -> None:
    wheel, said = wheel_without_compiler
    assert not [name for name in wheel.namelist() if name.endswith(".so")]
    assert "no C++ compiler found" in said
    assert "hundreds of times slower" in said


CROSS_COMPILER = """#!/bin/sh
if [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; exit; fi
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""


def test_a_cross_compiler_makes_a_wheel_for_its_architecture(tmp_path: Path) -> None:
    """`make arm` runs a real one; this one says that it is for Arm, and writes a file."""
    (compiler := tmp_path / "c++").write_text(CROSS_COMPILER)
    compiler.chmod(0o755)
    setup = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    wheel = ["bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist")]
    done = subprocess.run(
        [*setup, *wheel],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-linux_aarch64.whl")
    libraries = [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    assert libraries == [f"vllm_sparq/lib/libsparq_{isa}.so" for isa in of_machine("aarch64")]


def test_an_instruction_set_of_another_architecture_is_not_built(tmp_path: Path) -> None:
    (compiler := tmp_path / "c++").write_text(CROSS_COMPILER)
    compiler.chmod(0o755)
    env = {**os.environ, "CXX": str(compiler), "VLLM_SPARQ_BUILD_ISA": "avx2"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "VLLM_SPARQ_BUILD_ISA='avx2' is not an instruction set of aarch64: use one of ['neon']" in done.stderr
