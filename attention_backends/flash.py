"""Prompts on CUDA through vLLM's own copy of FlashAttention, over our pages as they are or restored from their codes.

A page in the model's type holds ``[N, 2, D]`` of a KV head, K and V of a token side by side. Seen as ``[P, N, G, D]``
that is a cache as FlashAttention takes it, with strides of its own: nothing is copied. The new tokens must be in their
pages already, unlike what `vllm_sparq.ops.prefill` asks for. Quantized blocks are restored, a layer at a time, to such
a cache (`vllm_sparq.attention_backends.steps.restored`).

Our Triton kernel stays for what FlashAttention cannot do: float32, prompts whose attention is added up (H2O), heads
that its version has no kernel for, and sinks where it does not take them: versions before 3, sinks of another type than
bfloat16. And for steps of few rows over quantized blocks, where restoring would not pay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_sparq.attention_backends.steps.restored import RestorePlan
from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dispatch import Choice

TAKE_SINKS = (3, 4)
"""Versions of FlashAttention whose softmax may begin at a sink."""

LARGEST_OF_2 = 256
"""Head size that version 2 takes."""


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
    if forced or tracked or dtype not in (torch.bfloat16, torch.float16):
        return None
    if not current_platform.is_cuda() or not current_platform.has_device_capability(80):
        return None
    version = _version(head_size, sinks is not None, bool(soft_cap))
    if sinks is not None and not (version in TAKE_SINKS and sinks.dtype == torch.bfloat16 and _has_sinks_argument()):
        return None
    over = "" if format == "model" else ", over blocks restored from codes where that pays"
    return None if version is None else Choice("prefill", "flash", f"FlashAttention {version} of vLLM{over}")


def _has_sinks_argument() -> bool:
    from vllm.v1.attention.backends import fa_utils

    return "s_aux" in inspect.signature(vars(fa_utils)["flash_attn_varlen_func"]).parameters


@functools.cache
def _version(head_size: int, has_sinks: bool, capped: bool) -> int | None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    if not FlashAttentionBackend.supports_head_size(head_size):
        return None
    version = get_flash_attn_version(head_size=head_size, has_sinks=has_sinks, requires_softcap=capped)
    return None if version == 2 and head_size > LARGEST_OF_2 else version


def flash_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PrefillRows | RestorePlan,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    soft_cap: float | None = None,
) -> None:
    """`vllm_sparq.ops.prefill.prefill` over a cache in the model's type that holds the new tokens too.

    Args:
        query: [T, H, D], of the whole step.
        keys, values: [P, N, G, D], dense in the last dimension.
        rows: which of its rows are attended to, over which blocks.
        out: [T, H, D], written in those rows.
        sinks: [H] in bfloat16, or None.
        soft_cap: of the logits, or None.
    """
    from vllm.v1.attention.backends import fa_utils

    if isinstance(rows, PrefillRows):
        clear_unwritten(values, rows)
    run: Any = vars(fa_utils)["flash_attn_varlen_func"]  # defined on CUDA alone
    run(
        q=query,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=rows.query_start_loc,
        max_seqlen_q=max(2, rows.max_query_len),  # of one row each, version 2 wants as many rows as requests
        seqused_k=rows.seq_lens,
        max_seqlen_k=rows.max_seq_len,
        softmax_scale=scale,
        causal=True,
        block_table=rows.block_table,
        fa_version=_version(query.shape[2], sinks is not None, bool(soft_cap)),
        softcap=soft_cap or 0.0,
        # Version 3 takes a batch of many short pieces for one, and would split their keys, with scratch for each split.
        num_splits=1 if isinstance(rows, RestorePlan) else 0,
        **({} if sinks is None else {"s_aux": sinks}),
    )


def clear_unwritten(values: torch.Tensor, rows: PrefillRows) -> None:
    """Zero V behind the last token of each request, in the page that token is in; ``values`` as in `flash_prefill`.

    Versions that load whole pages multiply it by nothing, and what an earlier owner of the page has left, or memory
    that was never written, may be NaN. K needs no such care: a logit behind the last token is overwritten.
    """
    pages, behind = rows.unwritten(values.shape[1])
    values[pages] = values[pages].masked_fill_(behind[:, :, None, None], 0)


def restored_cache(
    plan: RestorePlan,
    pages: Pages,
    key: torch.Tensor,
    value: torch.Tensor,
    room: Sequence[torch.Tensor],
    run: Callable[..., None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [P', N, G, D] that the rows of a plan see.

    Args:
        pages: the cache, in which all full blocks have codes by now.
        key, value: [T', G, D], the step's own tokens.
        room: two vectors of the model's type, for K and for V.
        run: an implementation of `vllm_sparq.ops.restore.restore`.
    """
    n, d, n_kv_heads = pages.layout.block_size, pages.layout.head_size, pages.data.shape[1]
    shape = plan.n_pages, n_kv_heads, n, d
    keys, values = (part[: plan.n_pages * n_kv_heads * n * d].view(shape).transpose(1, 2) for part in room)
    tables = plan.requests, plan.n_blocks, plan.first_pages
    run(pages, *tables, most_blocks=plan.most_blocks, keys=keys, values=values)
    values[plan.n_restored :] = 0  # a kernel may multiply what follows the last token by nothing
    keys[plan.pages, plan.places] = key[plan.keys]
    values[plan.pages, plan.places] = value[plan.keys]
    return keys, values
