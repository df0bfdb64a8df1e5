"""Every Triton kernel compiles for A100 and H100, without a GPU, and fits their shared memory.

``VLLM_SPARQ_TEST_TRITON`` names a folder with another Triton than the installed one: see ``make aot``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.ops.aot_shapes import KERNELS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What one program may use, by compute capability."""

MAX_SPILL_BYTES, OLD_SPILL_BYTES = 128, 384
"""Of local memory per thread. A few spilled registers cost nothing; a kernel that keeps its tile there is unusable.
Triton 3.6 spills 368 bytes in one variant, `score_kernel` with a mean value and one query head per KV head."""


ALL_SECONDS = 3000
"""For every variant: 231 take ten minutes of one core."""


def triton_version() -> tuple[int, ...]:
    """Of the Triton that compiles, up to the minor number."""
    other = os.environ.get("VLLM_SPARQ_TEST_TRITON")
    folder = {"path": [other]} if other else {}
    found = next(iter(metadata.distributions(name="triton", **folder)))
    return tuple(int(number) for number in found.version.split(".")[:2])


def start(*command: str) -> subprocess.Popen[str]:
    """A Python process that compiles ahead of time: ``command`` is a module and its arguments."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    other = env.get("VLLM_SPARQ_TEST_TRITON", "")
    env["PYTHONPATH"] = os.pathsep.join([*filter(None, [other]), str(ROOT), env.get("PYTHONPATH", "")])
    env["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines_of(job: subprocess.Popen[str], seconds: int = 570) -> list[dict[str, Any]]:
    try:
        out, err = job.communicate(timeout=seconds)
    finally:
        job.kill()
    assert job.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines()]


def run_ahead_of_time(*command: str, seconds: int = 570) -> list[dict[str, Any]]:
    """The lines that `start` prints."""
    return lines_of(start(*command), seconds)


def compiled(
    *arguments: str, archs: Iterable[int] = SHARED_BYTES, seconds: int = 570
) -> dict[int, list[dict[str, Any]]]:
    """By compute capability, a row per variant that `tests.ops.aot` compiles."""
    jobs = {arch: start("tests.ops.aot", str(arch), *arguments) for arch in archs}
    return {arch: lines_of(job, seconds) for arch, job in jobs.items()}


def assert_fit(rows: list[dict[str, Any]], arch: int) -> None:
    assert {row["kernel"] for row in rows} == KERNELS
    assert not [row for row in rows if row["shared"] > SHARED_BYTES[arch]], "more shared memory than there is"
    most = MAX_SPILL_BYTES if triton_version() >= (3, 7) else OLD_SPILL_BYTES
    assert not [row for row in rows if row["spilled"] > most], "local memory per thread"


def test_every_kernel_compiles_and_fits() -> None:
    """One variant of each, on the larger of the two."""
    for arch, rows in compiled(archs=[90]).items():
        assert_fit(rows, arch)


def test_what_is_launched_at_start_is_accepted() -> None:
    """Of every number of splits and every tile; a kernel that Triton refuses would end each start of an engine."""
    rows = run_ahead_of_time("tests.ops.aot", "90", "--start")
    assert {row["kernel"] for row in rows} == KERNELS - {"count_kernel", "cut_kernel"}  # of mass
    assert len(rows) > 100


@pytest.mark.long
@pytest.mark.timeout(3 * ALL_SECONDS + 60)
def test_every_variant_compiles_and_fits() -> None:
    assert len(run_ahead_of_time("tests.ops.aot", "90", "--start", "--all", seconds=ALL_SECONDS)) > 500
    for arch, rows in compiled("--all", seconds=ALL_SECONDS).items():
        assert_fit(rows, arch)
        assert len(rows) > 3 * len(KERNELS)
