"""Attention of one new token per request to few spans of neighbouring tokens: Quest's bounds, InfLLM's keys."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import require
from vllm_sparq.ops.dense_decode import check_decode
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.reads import SpansRead


def quest_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SpansRead,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Quest (Tang et al. 2024, arXiv 2406.10774), per request b and KV head, q the heads of its query group.

    With representatives instead of bounds it is the lookup of InfLLM (Xiao et al. 2024, arXiv 2402.04617): see below.

    A *span* is `SPAN_TOKENS` = 16 neighbouring tokens, ``16 p .. 16 p + 15``; the last one of a context may hold
    fewer. It is what Quest calls a page; a page here is one block of one KV head, and holds N / 16 spans.

    A request that ``read.is_dense`` is attended to densely, exactly as `dense_decode` does. Otherwise:

    1. *Bounds*: the least ``low_pc`` and the largest ``high_pc`` element of K in span p and channel c: the page's
       ``ranking`` part in full pages, K itself in the unfinished one (elements that are not finite count as 0). In
       quantized formats the newest block, staged, counts as unfinished; its bounds are from K in the model's type too.
    2. *Upper bounds of the logits*: ``u_p = sum_g sum_c max(q_gc low_pc, q_gc high_pc)``, which no token of the span
       exceeds in its summed ``q_g . K``. That is ``a . high_p + b . low_p`` with ``a = sum_g max(q_g, 0)`` and
       ``b = sum_g min(q_g, 0)``: one dot product of 2 D elements per span for the whole group.
    3. *Spans*: the newest one, and of the others those with the largest ``u_p`` (ties: oldest), ``read.n_spans(S)`` in
       all. Quest chooses for each query head; like everything here, this chooses once per KV head.
    4. ``out_g``: softmax attention with ``scale`` over all tokens of those spans.

    InfLLM's read differs in what ranks spans and in which need no rank. Both rows of ``ranking`` are the mean of a
    span's representative keys (`represent`), so that ``u_p`` is their mean logit, summed over the group. The paper sums
    over all heads of a layer; here each KV head chooses, since its pages are its own. The first ``read.n_first`` spans
    and the newest ``read.n_newest(S)`` are read in any case; all others have representatives.

    Args:
        query: [B, H, D], one row per request; its own K and V are already in the pages.
        pages: the cache, with ``ranking`` of the kind ``read.ranked_by``, and no ``positions`` (a span must hold
            neighbours).
        block_table: int32 [>= B, M]; entries past a request's last block, and its staging blocks, are never read.
        seq_lens: int32 [>= B], context lengths S, the current token included. A row with S = 0 (padding) is zero.
        read: what to read.
        scale: of the logits, normally 1 / sqrt(D).
        out: [B, H, D], written. Sums are fp32, rounded once at the end.
        sinks: fp32 [H] or None, as in `dense_decode`: in the softmax of step 4, whatever is chosen.
        soft_cap: None, or as in `dense_decode`, in step 4; bounds are of logits without it.

    Raises:
        ValueError: a shape, type or stride that does not fit, or pages without what ranks or with positions.
        NotImplementedError: representatives on a GPU.
    """
    check_decode(query, pages, block_table, seq_lens, out, sinks, soft_cap)
    layout = pages.layout
    require(
        layout.ranking == read.ranked_by,
        f"quest_decode needs pages with ranking {read.ranked_by!r}; this layout has {layout.ranking!r}",
    )
    require(not layout.positions, "quest_decode needs pages that keep all tokens; this layout has positions")
    choice = choose("quest_decode", query.device.type)
    if choice.implementation == "triton" and read.ranked_by != "bounds":
        raise NotImplementedError(f"quest_decode ranks spans by {read.ranked_by} on CPU alone so far")
    run = choice.load()
    run(query, pages, block_table, seq_lens, read=read, scale=scale, out=out, sinks=sinks, soft_cap=soft_cap)
