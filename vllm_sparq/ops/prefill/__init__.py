"""Dense causal attention of several new tokens per request over [cached pages ; the new tokens]."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_softmax, check_starts, check_table, require
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
    key_start_loc: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Row i of request b sees the request's ``context_lens[b]`` cached tokens, then its new tokens up to row i itself.

    The new tokens are taken from ``key`` and ``value``, never from the pages: it does not matter whether they have been
    written yet. Of quantized pages only whole blocks are read, from their codes: ``context_lens`` are multiples of the
    block size there. Tokens of a block that was begun before come along in ``key`` and ``value``, in front of the
    request's new ones, and ``key_start_loc`` says where each request's begin.

    Where pages have ``attention``, each token's probabilities, as the mean over the query group and the sum over the
    rows, are added to its entry: cached tokens in slots below ``context_lens[b]``, and those of ``key`` in the slots
    after, where `write` has put them before. Without an S x S tensor.

    Args:
        query: [T, H, D].
        key: [T, G, D], value: [T, G, D]: the new tokens; [T', G, D] with ``key_start_loc``.
        pages: the cache.
        block_table: int32 [>= B, M]; entries past the last cached block are never read.
        query_start_loc: int32 [B + 1], ascending: request b owns rows ``[b] : [b + 1]``. Rows outside every request are
            padding; their output is undefined.
        context_lens: int32 [>= B], tokens in the pages before the new ones; 0 for a request that starts.
        scale: of the logits, normally 1 / sqrt(D).
        key_start_loc: int32 [B + 1] or None for ``query_start_loc``. Request b owns rows ``[b] : [b + 1]`` of key and
            value, at least as many as of query; its queries belong to the last of them.
        out: [T, H, D], written. Sums are fp32, rounded once at the end.
        sinks: fp32 [H] or None, as in `dense_decode`: in the softmax of every row.
        soft_cap: None, or as in `dense_decode`.

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_heads("query", query, pages, multiple_of_kv_heads=True)
    check_heads("key", key, pages, multiple_of_kv_heads=False)
    check_heads("value", value, pages, multiple_of_kv_heads=False)
    check_heads("out", out, pages, multiple_of_kv_heads=True)
    require(out.shape == query.shape, f"out must be {tuple(query.shape)} like query, got {tuple(out.shape)}")
    require(
        key.shape == value.shape and (key_start_loc is not None or key.shape[0] == query.shape[0]),
        f"key and value must have {query.shape[0]} rows like query (unless key_start_loc says otherwise), "
        f"got {tuple(key.shape)} and {tuple(value.shape)}",
    )
    n_requests = check_starts(query_start_loc)
    require(
        key_start_loc is None or check_starts(key_start_loc) == n_requests,
        f"key_start_loc must have {n_requests + 1} entries like query_start_loc",
    )
    check_table(block_table, n_requests, context_lens=context_lens)
    check_softmax(query, sinks, soft_cap)
    run = choose("prefill", query.device.type).load()
    tables, softmax = (block_table, query_start_loc, context_lens), {"sinks": sinks, "soft_cap": soft_cap}
    run(query, key, value, pages, *tables, scale=scale, out=out, key_start_loc=key_start_loc, **softmax)
