"""Engines on the pretended CUDA, in processes of their own: platform and environment are those of a whole process."""

from __future__ import annotations

import itertools
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
    "other processes, which would not be pretended": (
        "test_processes.py",
        "test_serve.py",
        "test_serve_data_parallel.py",
        "test_serve_eviction.py",
        "test_spans.py::test_tensor_parallel",
        "test_spans.py::test_speculative_decoding",  # inside/test_drafts.py is about it
        "test_formats.py::test_tensor_parallel",
        "test_eviction.py::test_tensor_parallel",
        "test_split_groups.py",  # as many workers as GPUs, and there is one
    ),
    "previews on CPU, refused here: inside/test_refusals.py": (
        "test_lossless.py",
        "test_draft_failures.py",
        "test_drafts.py",
        "test_choices.py",
        "test_infllm.py",
        "test_poison.py::test_answers_over_poison[infllm]",
        "test_identity.py::test_equals_dense[full infllm]",
        "test_positions.py",
        "test_two_engines.py::test_each_answers_as_alone[lossless and mass]",
        "test_two_engines.py::test_each_answers_as_alone[other positions, and evicting under pressure]",
    ),
    "layers on backends of vLLM's own, whose kernels are not here": (
        "test_capacity.py",
        "test_models.py::test_hybrid_model",  # inside/test_models.py is about it
        "test_models.py::test_head_sizes[48]",
        "test_models.py::test_codes_of_other_head_sizes[48]",
        "test_softmax.py",
        "test_shared_pages.py::test_answers[int4 beside chunks]",
        "test_found.py",
        "test_states.py",  # inside/test_states.py is about it, with convolutions
    ),
    "logits that are NaN, of which the interpreter makes an error": (
        "test_poison.py::test_poison_is_seen",
        "test_formats.py::test_capacity",  # stock vLLM's first run over memory that an earlier test had poisoned
    ),
    "what vLLM chooses and refuses itself differs by platform": ("test_refusals.py", "test_schedulers.py"),
}
"""Why tests of engines are not asked here -> which."""


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_engines() -> None:
    """Every test of engines but those that start other processes, which would not be pretended."""
    names = itertools.chain.from_iterable(ELSEWHERE.values())
    left_out = [f"--{'deselect' if '::' in name else 'ignore'}=tests/engine/{name}" for name in names]
    run("tests/engine", *left_out, "-m", "not long and not real")
