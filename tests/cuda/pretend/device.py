"""`torch.cuda` and `torch.accelerator` of a device that is not there."""

from __future__ import annotations

from typing import Any

import torch

from tests.cuda.pretend.graphs import Graph, capture, guard_host_reads

MEMORY = 16 << 30
"""Bytes that the device says it has, all of them free."""

CAPABILITY = 9, 0


def nothing(*_: Any, **__: Any) -> None:
    """What is done where there is nothing to do."""


def always(value: Any) -> Any:
    """A function that gives this, whatever it is asked."""
    return lambda *_, **__: value


def install() -> None:
    """What `vllm.v1.worker.cpu.shm`, which brings streams, events and pinned memory, leaves out."""
    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = Graph, capture
    cuda.graph_pool_handle = always((0, 0))
    cuda.is_current_stream_capturing = lambda: Graph.capturing is not None
    cuda.empty_cache = cuda.reset_peak_memory_stats = cuda.synchronize = nothing
    cuda.max_memory_allocated = cuda.current_device = always(0)
    cuda.get_device_capability = always(CAPABILITY)
    cuda.memory.get_allocator_backend = always("pretended")
    accelerator: Any = torch.accelerator
    accelerator.memory_stats = always({})
    for name in ("memory_reserved", "memory_allocated", "max_memory_allocated", "current_device_index"):
        setattr(accelerator, name, always(0))
    accelerator.reset_peak_memory_stats = accelerator.empty_host_cache = nothing
    accelerator.device_count = always(1)
    accelerator.get_memory_info = always((MEMORY, MEMORY))
    guard_host_reads()
