"""Engines on the pretended CUDA, in processes of their own: platform and environment are those of a whole process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
INSIDE = "tests/cuda/inside"


def run(*arguments: str, **environment: str) -> str:
    """What pytest prints inside; fails with it."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.cuda.plugin", "-p", "no:cacheprovider", "-q", "-n", "0"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / INSIDE).glob("test_*.py")))
def test_inside(name: str) -> None:
    """What the path itself promises."""
    run(f"{INSIDE}/{name}.py")


@pytest.mark.long
def test_engines() -> None:
    """Every test of engines but those that start other processes, which would not be pretended."""
    others = ("processes", "serve", "serve_data_parallel", "serve_eviction")
    run(
        "tests/engine",
        *(f"--ignore=tests/engine/test_{name}.py" for name in others),
        "-m",
        "not long and not cpu_worker",
    )
