"""What every test shares: where helpers are found, and the Triton interpreter where there is no CUDA device."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers are imported by folder: `from ops.cases import Case`

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports triton


@pytest.fixture(autouse=True)
def _one_thread_for_tiny_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under tests/ops, where threads of torch only cost time; `ops.cases.load` gives kernels theirs."""
    before = torch.get_num_threads()
    if request.path.parent.name == "ops":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
