"""What every test shares: the Triton interpreter where there is no CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports triton


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under tests/ops, where threads of torch only cost time; `tests.ops.cases.load` gives kernels theirs."""
    before = torch.get_num_threads()
    if request.node.nodeid.startswith("tests/ops/"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
