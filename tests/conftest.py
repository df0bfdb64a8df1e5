"""What every test shares: threads, how Python starts, and the Triton interpreter where there is no CUDA device."""

from __future__ import annotations

import importlib.util
import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when libgomp is loaded, so before torch. Two workers of pytest-xdist with a team of threads each would wait for
# each other at every barrier, of which a step of an engine has hundreds: most of the time of the engine tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the tests of kernels ask for three threads on any machine

import torch

from tests import interpreter

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports triton
    if importlib.util.find_spec("triton"):
        interpreter.speed_up()

STARTUP = Path(__file__).parent / "startup"
runpy.run_path(str(STARTUP / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))

LONGEST = (
    "cuda/test_pretended.py",
    "ops/test_dispatch.py",
    "ops/test_sparq_decode.py",
    "benchmarks/cluster/test_bench.py",
    "engine/test_formats.py",
    "engine/test_eviction.py",
    "ops/test_triton_aot.py",
    "ops/test_attention.py",
    "benchmarks/serving/test_demo.py",
    "benchmarks/quality/test_engine.py",
    "test_doctor.py",
    "engine/test_serve.py",
    "engine/test_poison.py",
    "engine/test_sameness.py",
    "engine/test_choices.py",
    "architectures/test_architectures.py",
    "engine/test_identity.py",
    "engine/test_lossless.py",
    "docs/test_examples.py",
    "engine/test_processes.py",
    "engine/test_conversations.py",
    "benchmarks/quality/test_divergence.py",
    "engine/test_sessions.py",
    "benchmarks/engine/test_pressure.py",
    "engine/test_positions.py",
    "engine/test_states.py",
)
"""Files that take more than about twenty seconds, the longest first: they begin before the others, so that no worker of
pytest-xdist ends with one of them while the other has nothing to do (`--dist loadfile --no-loadscope-reorder`)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: i for i, name in enumerate(LONGEST)}
    missing = [str(path) for path in rank if not path.is_file()]
    if missing:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names files that are not there: {missing}")
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Engines fork (tests/startup), but for the long tests, which see what becomes of killed processes."""
    os.environ["VLLM_SPARQ_TESTS_FORK"] = "" if item.get_closest_marker("long") else "1"


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under tests/ops, where threads of torch only cost time; `tests.ops.cases.load` gives kernels theirs."""
    before = torch.get_num_threads()
    if request.node.nodeid.startswith("tests/ops/"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
