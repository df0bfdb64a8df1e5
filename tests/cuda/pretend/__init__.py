"""A CUDA that is not there: vLLM's CUDA platform, worker, model runner V2 and CUDA graphs, over tensors in memory.

`install` turns a process of vLLM's CPU build into one that takes itself for a machine with an H100. What runs then is
vLLM's own code for CUDA and ours: `CudaPlatform` and `SparqCudaPlatform`, `gpu_worker.Worker` and `SparqCudaWorker`,
the model runner of the second generation with padded batches and steps scheduled ahead, its profiling of memory and of
graphs, piecewise and full graphs that are recorded and replayed. Our ops run in C++, or as Triton kernels that are
interpreted (``VLLM_SPARQ_IMPL=triton``).

What it cannot show: races and streams (everything happens in order), memory that runs out, torch.compile, kernels as
they are compiled, FlashAttention.
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",  # the default on CUDA
    "VLLM_USE_BREAKABLE_CUDAGRAPH": "1",  # piecewise graphs that torch.compile does not have to cut
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def install() -> None:
    """Pretend, from now to the end of this process; before anything imports vLLM."""
    os.environ.update(ENVIRONMENT)
    from tests.cuda.pretend import device, libraries, vllm_parts

    libraries.install()
    device.install()
    vllm_parts.install()
