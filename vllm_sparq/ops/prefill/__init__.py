"""Dense causal attention of several new tokens per request over [cached pages ; the new tokens]."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_starts, check_table, require
from vllm_sparq.ops.dispatch import choose


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Row i of request b sees the request's ``context_lens[b]`` cached tokens, then its new tokens up to row i itself.

    The new tokens are taken from ``key`` and ``value``, never from the pages: it does not matter whether they have been
    written yet, and a quantized page format costs nothing inside the chunk.

    Args:
        query: [T, H, D].
        key: [T, G, D], value: [T, G, D]: the new tokens.
        pages: the cache.
        block_table: int32 [>= B, M]; entries past the last cached block are never read.
        query_start_loc: int32 [B + 1], ascending: request b owns rows ``[b] : [b + 1]``. Rows outside every request are
            padding; their output is undefined.
        context_lens: int32 [>= B], tokens in the pages before the new ones; 0 for a request that starts.
        scale: of the logits, normally 1 / sqrt(D).
        out: [T, H, D], written. Sums are fp32, rounded once at the end.

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_heads("query", query, pages, multiple_of_kv_heads=True)
    check_heads("key", key, pages, multiple_of_kv_heads=False)
    check_heads("value", value, pages, multiple_of_kv_heads=False)
    check_heads("out", out, pages, multiple_of_kv_heads=True)
    require(out.shape == query.shape, f"out must be {tuple(query.shape)} like query, got {tuple(out.shape)}")
    rows = query.shape[0]
    require(
        key.shape[0] == rows and value.shape[0] == rows,
        f"key and value must have {rows} rows like query, got {tuple(key.shape)} and {tuple(value.shape)}",
    )
    check_table(block_table, check_starts(query_start_loc), context_lens=context_lens)
    run = choose("prefill", query.device.type).load()
    run(query, key, value, pages, block_table, query_start_loc, context_lens, scale=scale, out=out)
