"""What a wheel holds, and what installing it touches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile

import pytest

from tests.test_imports import ROOT, sources


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
