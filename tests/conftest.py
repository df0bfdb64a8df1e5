"""What every test shares: where helpers are found, and the Triton interpreter where there is no CUDA device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers are imported by folder: `from ops.cases import Case`

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before anything imports triton

torch.set_num_threads(1)  # the tensors are tiny; kernels get threads of their own in `ops.cases.load`
