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


def test_inside() -> None:
    """What the path itself promises, and the Triton kernels in its graphs."""
    run(INSIDE, "-m", "not long")


@pytest.mark.long
def test_more_inside() -> None:
    """More kernels in its graphs."""
    run(INSIDE, "-m", "long")


ELSEWHERE = {
    "test_processes.py": "other processes, which would not be pretended",
    "test_serve.py": "the same",
    "test_serve_data_parallel.py": "the same",
    "test_serve_eviction.py": "the same",
    "test_spans.py::test_tensor_parallel": "the same",
    "test_formats.py::test_tensor_parallel": "the same",
    "test_eviction.py::test_tensor_parallel": "the same",
    "test_spans.py::test_speculative_decoding": "the same; inside/test_drafts.py is about it",
    "test_capacity.py": "layers with a window, which vLLM gives to FlashAttention here",
    "test_models.py::test_hybrid_model": "the same; inside/test_models.py is about it",
    "test_found.py": "the same",
    "test_states.py": "vLLM's own kernels for states, which the interpreter does not run",
    "test_poison.py::test_poison_is_seen": "logits that are NaN, of which the interpreter makes an error",
    "test_refusals.py": "what vLLM refuses itself differs by platform",
}
"""Tests of engines that are not asked here, and what they are about instead."""


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_engines() -> None:
    """Every test of engines but those that start other processes, which would not be pretended."""
    left_out = []
    for name in ELSEWHERE:
        left_out.append(f"--deselect=tests/engine/{name}" if "::" in name else f"--ignore=tests/engine/{name}")
    run("tests/engine", *left_out, "-m", "not long")
