"""vLLM's CUDA platform and worker, told that tensors in memory are on their device."""

from __future__ import annotations

from typing import Any

import torch

from tests.cuda.pretend import device
from tests.cuda.pretend.device import always, nothing
from tests.cuda.pretend.libraries import record_native


def install() -> None:
    _platform()
    _custom_ops()
    _convolutions()
    _worker()
    _warm_up()
    record_native()


def _platform() -> None:
    from vllm import platforms
    from vllm.platforms import cuda
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability

    base: Any = cuda.CudaPlatformBase
    base.device_type, base.dispatch_key, base.dist_backend = "cpu", "CPU", "gloo"
    base.import_kernels = CpuPlatform.import_kernels
    answers = {
        "opaque_attention_op": False,  # so that a capture sees what attention launches
        "is_pin_memory_available": False,
        "get_current_memory_usage": 0,
        "manual_seed_all": None,
        "device_count": 1,
        "is_integrated_gpu": False,
        "num_compute_units": 132,
        "set_device": None,
        "graph_pool_handle": (0, 0),
    }
    for name, value in answers.items():
        setattr(base, name, classmethod(always(value)))
    pretended: Any = cuda.CudaPlatform
    pretended.get_device_capability = classmethod(always(DeviceCapability(*device.CAPABILITY)))
    pretended.get_device_name = classmethod(always("pretended H100"))
    pretended.get_device_total_memory = classmethod(always(device.MEMORY))
    platforms.builtin_platform_plugins["cuda"] = always("vllm.platforms.cuda.CudaPlatform")
    platforms.builtin_platform_plugins["cpu"] = nothing


def _custom_ops() -> None:
    from vllm import _custom_ops
    from vllm.utils import torch_utils

    same: Any = lambda tensor: tensor  # noqa: E731
    torch_utils.weak_ref_tensor = torch_utils.weak_ref_tensors = same
    for name in vars(_custom_ops):
        if "supports" in name and name.startswith("cutlass"):
            setattr(_custom_ops, name, always(False))


def _convolutions() -> None:
    """vLLM's Triton kernels for layers with a state are not for the interpreter; it has others for CPUs.

    The layers run them without an op around, so that a capture sees them, or ends before them.
    """
    from vllm.model_executor.layers.mamba.ops import causal_conv1d
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu, causal_conv1d_update_cpu

    causal_conv1d.causal_conv1d_fn = causal_conv1d_fn_cpu
    causal_conv1d.causal_conv1d_update = causal_conv1d_update_cpu
    from vllm.model_executor.layers.mamba import short_conv

    layer: Any = short_conv.ShortConv
    layer.forward = lambda self, hidden_states, output: short_conv.short_conv(hidden_states, output, self.prefix)


def _worker() -> None:
    import vllm.v1.worker.cpu.shm  # noqa: F401  streams, events, pinned memory, UVA buffers
    from vllm.utils import torch_utils
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu import buffer_utils

    torch_utils._current_stream_tls.value = torch.cuda.Stream()
    torch.accelerator.get_memory_info = always((device.MEMORY, device.MEMORY))  # type: ignore[assignment]
    buffer_utils.is_uva_available = always(True)
    worker: Any = gpu_worker.Worker
    worker.init_device = _init_device
    gpu_worker.kernel_warmup = nothing  # of kernels that need a device


def _init_device(self: Any) -> None:
    """`Worker.init_device` without the device."""
    from vllm.platforms import current_platform
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.utils.torch_utils import set_random_seed
    from vllm.v1.worker import gpu_worker

    self.device = torch.device("cpu")
    group = self.vllm_config, self.rank, self.distributed_init_method, self.local_rank
    gpu_worker.init_worker_distributed_environment(*group, current_platform.dist_backend)
    set_random_seed(self.model_config.seed)
    self.init_snapshot = MemorySnapshot(device=self.device)
    self.requested_memory = gpu_worker.request_memory(self.init_snapshot, self.cache_config, 0)
    self._init_workspace_and_model_runner()


def _warm_up() -> None:
    """What vLLM's warm-up samples with: the interpreter cannot run some of those kernels."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    greedy: Any = staticmethod(lambda: SamplingParams(temperature=0, max_tokens=8))
    SamplingParams.for_sampler_warmup = greedy
    bitmask: Any = nothing
    StructuredOutputsWorker.apply_grammar_bitmask = bitmask
