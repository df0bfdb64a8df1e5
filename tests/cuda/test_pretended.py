"""Engines on the pretended CUDA, in processes of their own: platform and environment are those of a whole process."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

LIMIT_S = 1700.0
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 100)]

ROOT = Path(__file__).parents[2]
INSIDE = "tests/cuda/inside"


def run(*arguments: str, seconds: float = LIMIT_S) -> None:
    """Have pytest run inside; what it prints is shown if a test fails or is skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.cuda.plugin", "-p", "no:cacheprovider", "-q", "-n", "0"]
    code, said = ended([*command, *arguments], seconds)
    assert code == 0, said[-8000:]
    assert all_passed(said), said[-4000:]


def ended(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a command that leaves nobody behind, however it ends.

    Raises:
        subprocess.TimeoutExpired: it took longer than ``seconds``.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, said


def all_passed(said: str) -> bool:
    """Whether tests passed, by pytest's last lines, and none was skipped, for which nothing inside has a reason."""
    return bool(re.search(r"\b\d+ passed", said)) and not re.search(r"\b\d+ (skipped|xfailed|xpassed)", said)


def test_inside() -> None:
    """What the path itself promises, and the Triton kernels in its graphs."""
    run(INSIDE, "-m", "not long")


@pytest.mark.long
def test_more_inside() -> None:
    """More kernels in its graphs."""
    run(INSIDE, "-m", "long")


@pytest.mark.parametrize(
    ("said", "is_well"),
    [
        ("69 passed, 5 deselected in 300.51s (0:05:00)", True),
        ("68 passed, 1 skipped, 5 deselected in 2.3s", False),
        ("68 passed, 1 xfailed in 2.3s", False),
        ("5 deselected in 2.3s", False),
        ("1 skipped in 2.3s", False),
    ],
)
def test_what_is_skipped_inside_is_found(said: str, is_well: bool) -> None:
    assert all_passed(said) == is_well


def test_what_takes_too_long_inside_is_ended() -> None:
    """With the processes that it has started."""
    child = f"import time; time.sleep(99)  # of {os.getpid()}"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(99)"
    with pytest.raises(subprocess.TimeoutExpired):
        ended([sys.executable, "-c", parent], seconds=3)
    started = [p for p in psutil.process_iter(["cmdline", "status"]) if child in (p.info["cmdline"] or ())]
    assert not [p for p in started if p.info["status"] != psutil.STATUS_ZOMBIE]


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
        "test_formats.py::test_capacity",
        "test_models.py::test_hybrid_model",  # inside/test_models.py is about it
        "test_models.py::test_head_sizes[48]",
        "test_models.py::test_codes_of_other_head_sizes[48]",
        "test_softmax.py",
        "test_shared_pages.py::test_answers[int4 beside chunks]",
        "test_found.py",
        "test_states.py",  # inside/test_states.py is about it, with convolutions
    ),
    "logits that are NaN, of which the interpreter makes an error": ("test_poison.py::test_poison_is_seen",),
    "what vLLM chooses and refuses itself differs by platform": ("test_refusals.py", "test_schedulers.py"),
}
"""Why tests of engines are not asked here -> which."""


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_engines() -> None:
    """Every test of engines but those that start other processes, which would not be pretended."""
    names = itertools.chain.from_iterable(ELSEWHERE.values())
    left_out = [f"--{'deselect' if '::' in name else 'ignore'}=tests/engine/{name}" for name in names]
    run("tests/engine", *left_out, "-m", "not long and not real", seconds=2900)
