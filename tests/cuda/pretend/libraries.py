"""Triton and the compiled parts of vLLM's CUDA build, as far as they are asked for."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.cuda.pretend.device import always
from tests.cuda.pretend.graphs import record


def install() -> None:
    _triton()
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    flash: Any = types.ModuleType("vllm.vllm_flash_attn")
    flash.compile_flash_attn_varlen_func_from_specs = flash.get_scheduler_metadata = None
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flash.is_fa_version_supported, flash.fa_version_unsupported_reason = always(True), always(None)
    sys.modules["vllm.vllm_flash_attn"] = sys.modules["vllm.vllm_flash_attn.flash_attn_interface"] = flash


def _triton() -> None:
    """A backend named ``cpu``, which vLLM's CPU build looks for; and launches that graphs record."""
    from triton import backends
    from triton.runtime import interpreter

    driver = type("Driver", (), {"is_active": staticmethod(always(True))})
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=driver)
    launch = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            record(lambda: launch(self, *args, **kwargs))
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded
    _any_mask(interpreter.InterpreterBuilder)


def _any_mask(builder: Any) -> None:
    """Masks that are no booleans, as some of vLLM's kernels have; compiled, whatever is not zero counts as true."""
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return mask if mask.data.dtype == bool else type(mask)(mask.data != 0, mask.dtype)

    builder.create_masked_load = lambda self, ptrs, mask, *rest: load(self, ptrs, boolean(mask), *rest)
    builder.create_masked_store = lambda self, ptrs, value, mask, *rest: store(self, ptrs, value, boolean(mask), *rest)


def record_native() -> None:
    """Calls of our C++ are launches too."""
    from vllm_sparq.ops import native

    find = native.function

    def function(name: str) -> Any:
        call = find(name)

        def recorded(*args: Any) -> None:
            record(lambda: call(*args))
            call(*args)

        return recorded

    native.function = function


FLASH_CALLS: list[dict[str, Any]] = []
"""Arguments of the last calls of `flash_attn_varlen_func`: tensors as (shape, strides, type), lengths as numbers."""


def flash_attn_varlen_func(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [P, N, G, D]
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    fa_version: int,
    softcap: float = 0.0,
    num_splits: int = 0,
    s_aux: torch.Tensor | None = None,
) -> None:
    """Stands for FlashAttention over a paged cache, with its signature, and refuses what it would refuse.

    V is multiplied in whole pages, as those of versions that load them so: by nothing after the last token.
    """
    n, group = k.shape[1], q.shape[1] // k.shape[2]
    assert s_aux is None or (fa_version == 3 and s_aux.dtype == torch.bfloat16 and s_aux.shape == q.shape[1:2])
    no_sinks = torch.full((q.shape[1],), float("-inf"))
    sinks = (no_sinks if s_aux is None else s_aux.float())[:, None, None]
    assert causal
    assert num_splits in (0, 1)
    assert max_seqlen_q > 1 or len(q) == len(seqused_k)  # version 2 puts the rows of a query group in place of one
    assert fa_version in (2, 3)
    assert q.dtype == k.dtype == v.dtype in (torch.bfloat16, torch.float16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == 1
    assert all(stride * q.element_size() % 16 == 0 for stride in (*k.stride()[:3], *v.stride()[:3], *q.stride()[:2]))
    assert n % 16 == 0
    tables = cu_seqlens_q, seqused_k, block_table
    assert all(tensor.dtype == torch.int32 for tensor in tables)
    assert block_table.shape[0] == len(seqused_k) == len(cu_seqlens_q) - 1
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    for b, length in enumerate(lens):
        rows = slice(starts[b], starts[b + 1])
        n_rows = rows.stop - rows.start
        assert n_rows <= max_seqlen_q
        assert n_rows <= length <= max_seqlen_k
        blocks = block_table[b, : -(-length // n)].long()
        keys, values = (x[blocks].flatten(0, 1).float() for x in (k, v))  # [whole pages, G, D]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        logits = torch.einsum("thd,shd->hts", q[rows].float(), keys) * softmax_scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        last = torch.arange(length - n_rows, length)[:, None]
        logits = logits.masked_fill(torch.arange(len(keys)) > last, float("-inf"))
        logits = torch.cat([sinks.expand(-1, n_rows, 1), logits], -1)
        out[rows] = torch.einsum("hts,shd->thd", logits.softmax(-1)[..., 1:], values).to(out.dtype)
    FLASH_CALLS.append({"starts": starts, "lens": lens, "k_stride": k.stride(), "table": tuple(block_table.shape)})
    FLASH_CALLS[-1] |= {"sinks": s_aux is not None, "splits": num_splits}
