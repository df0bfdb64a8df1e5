"""What Triton would compile anew: the keys of its launches, by its own binder, on a machine without a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit

from vllm_sparq.ops import warm_up
from vllm_sparq.ops.triton_common import launch
from vllm_sparq.ops.triton_common.merge import merge_kernel

H100_SMS = 132


@functools.cache
def binder_of(kernel: Any) -> Any:
    """How the launcher of an H100 looks at the arguments of a kernel, be it one that is interpreted here."""
    given = {n: kernel.kwargs[n] for n in ("do_not_specialize", "do_not_specialize_on_alignment")}
    compiled = jit.JITFunction(kernel.fn, **given)
    target = CUDABackend(GPUTarget("cuda", 90, 32))
    return jit.create_function_from_signature(compiled.signature, compiled.params, target)


def key_of(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[str, str]:
    """(name, what Triton looks compiled code up with)."""
    _, specialization, options = binder_of(kernel)(*args, **named)
    return kernel.fn.__name__, jit.compute_cache_key({}, specialization, options)


@contextmanager
def keys() -> Iterator[list[tuple[str, str]]]:
    """The keys of our launches in here, which are noted instead of done, on an H100; vLLM's own kernels run."""
    found: list[tuple[str, str]] = []
    interpreted = type(merge_kernel)
    run = interpreted.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        if kernel.fn.__module__.startswith("vllm_sparq."):
            found.append(key_of(kernel, args, named))
        else:
            run(kernel, *args, grid=grid, warmup=warmup, **named)

    launch.n_multiprocessors.cache_clear()
    with (
        mock.patch.object(interpreted, "run", note),
        mock.patch.object(launch, "INTERPRETED_SMS", H100_SMS),
        mock.patch.object(warm_up, "IS_COMPILED", True),
    ):
        yield found
    launch.n_multiprocessors.cache_clear()


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same, beginning where a cut may begin: 4 bytes after a multiple of 16."""
    place = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    shift = (4 - place.data_ptr()) % 16 // tensor.element_size()
    moved = place[shift : shift + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)
