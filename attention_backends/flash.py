"""Prompts on CUDA through vLLM's own copy of FlashAttention, over our pages as they are.

A page in the model's type holds ``[N, 2, D]`` of a KV head, K and V of a token side by side. Seen as ``[P, N, G, D]``
that is a cache as FlashAttention takes it, with strides of its own: nothing is copied. The new tokens must be in their
pages already, unlike what `vllm_sparq.ops.prefill` asks for.

Our Triton kernel stays for what FlashAttention cannot do: codes, float32, GPUs before Ampere, prompts whose attention
is added up (H2O), and sinks where it does not take them: versions before 3, sinks of another type than bfloat16.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dispatch import Choice

TAKE_SINKS = (3, 4)
"""Versions of FlashAttention whose softmax may begin at a sink."""


def flash_choice(
    *,
    dtype: torch.dtype,
    head_size: int,
    format: str,
    tracked: bool,
    forced: str | None,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> Choice | None:
    """FlashAttention where it serves the prompts of a layer, with the reason in words; else None.

    Args:
        tracked: whether the attention that tokens get is added up.
        forced: the value of `VLLM_SPARQ_IMPL`, which names another implementation.
        sinks: [H] of the layer, or None.
        soft_cap: of its logits, or None.
    """
    if forced or tracked or format != "model" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if not current_platform.is_cuda() or not current_platform.has_device_capability(80):
        return None
    version = _version(head_size, sinks is not None, bool(soft_cap))
    if sinks is not None and not (version in TAKE_SINKS and sinks.dtype == torch.bfloat16 and _has_sinks_argument()):
        return None
    return None if version is None else Choice("prefill", "flash", f"FlashAttention {version} of vLLM")


def _has_sinks_argument() -> bool:
    from vllm.v1.attention.backends import fa_utils

    return "s_aux" in inspect.signature(vars(fa_utils)["flash_attn_varlen_func"]).parameters


@functools.cache
def _version(head_size: int, has_sinks: bool, capped: bool) -> int | None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    if not FlashAttentionBackend.supports_head_size(head_size):
        return None
    return get_flash_attn_version(head_size=head_size, has_sinks=has_sinks, requires_softcap=capped)


def flash_prefill(
    query: torch.Tensor,
    pages: Pages,
    rows: PrefillRows,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    soft_cap: float | None = None,
) -> None:
    """`vllm_sparq.ops.prefill.prefill` for pages in the model's type that hold the new tokens too.

    Args:
        query: [T, H, D], of the whole step.
        rows: which of its rows are attended to, over which blocks.
        out: [T, H, D], written in those rows.
        sinks: [H] in bfloat16, or None.
        soft_cap: of the logits, or None.
    """
    from vllm.v1.attention.backends import fa_utils

    run: Any = vars(fa_utils)["flash_attn_varlen_func"]  # defined on CUDA alone
    run(
        q=query,
        k=pages.keys.transpose(1, 2),
        v=pages.values.transpose(1, 2),
        out=out,
        cu_seqlens_q=rows.query_start_loc,
        max_seqlen_q=rows.max_query_len,
        seqused_k=rows.seq_lens,
        max_seqlen_k=rows.max_seq_len,
        softmax_scale=scale,
        causal=True,
        block_table=rows.block_table,
        fa_version=_version(query.shape[2], sinks is not None, bool(soft_cap)),
        softcap=soft_cap or 0.0,
        **({} if sinks is None else {"s_aux": sinks}),
    )
