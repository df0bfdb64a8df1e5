"""`pytest -p tests.every --every N`: which cases a slow machine runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WRITTEN = """
import pytest

@pytest.mark.parametrize("kernel", ["cpu", "triton"] * 5)
def test_many(kernel): ...

def test_of_cpu(): ...

def test_another_of_cpu(): ...
"""

SINGLE = ["test_of_cpu", "test_another_of_cpu"]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("--every", "1", "-k", "triton"), ["triton0", "triton1", "triton2", "triton3", "triton4"]),
        (("--every", "3"), ["cpu0", "triton1", "cpu3", "triton4", *SINGLE]),
        (("--every", "4", "-k", "cpu"), ["cpu0", "cpu4", *SINGLE]),
    ],
)
def test_the_first_case_of_each_test_and_every_nth_after_it(
    tmp_path: Path, words: tuple[str, ...], kept: list[str]
) -> None:
    file = tmp_path / "test_written.py"
    file.write_text(WRITTEN)
    plugins = ("-p", "tests.every", "-p", "no:cacheprovider")
    command = [
        sys.executable,
        "-m",
        "pytest",
        *plugins,
        "--rootdir",
        str(tmp_path),
        "--collect-only",
        "-q",
        str(file),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    cases = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert [case.removeprefix("test_many[").removesuffix("]") for case in cases] == kept
