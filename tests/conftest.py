"""What every test shares: threads, and the Triton interpreter where there is no CUDA device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under tests/ops, where threads of torch only cost time; `tests.ops.cases.load` gives kernels theirs."""
    before = torch.get_num_threads()
    if request.node.nodeid.startswith("tests/ops/"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
