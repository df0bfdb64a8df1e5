"""Attention of one new token per request over all its pages."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_softmax, check_table, require
from vllm_sparq.ops.dispatch import choose


def dense_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """``out[b] = softmax(scale * query[b] K^T) V`` over the ``seq_lens[b]`` cached tokens of request b.

    In a quantized format every full block but the newest is read from its codes, the newest block from where it is
    staged, in the model's own type. (The newest block is that of token S - 1, even if that token just filled it.)

    Where pages have ``attention``, each token's probability, as the mean over the query group, is added to its entry.

    Args:
        query: [B, H, D], one row per request; its own K and V are already in the pages.
        pages: the cache. Query heads ``h`` of one KV head are neighbours: ``h // (H / G)``.
        block_table: int32 [>= B, M]; entries past a request's last block, and its staging blocks, are never read.
        seq_lens: int32 [>= B], context lengths S >= 1, the current token included. A row with S = 0 (padding) is zero.
        scale: of the logits, normally 1 / sqrt(D).
        out: [B, H, D], written. Sums are fp32, rounded once at the end.
        sinks: fp32 [H], or None. A head's sink is one more logit, to the base e and not scaled, of a token whose V is
            zero: probability that goes nowhere (gpt-oss). It is counted once per row, in ``attention`` too.
        soft_cap: None, or logits of tokens are ``soft_cap * tanh(logit / soft_cap)`` (Gemma 2).

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_decode(query, pages, block_table, seq_lens, out, sinks, soft_cap)
    run = choose("dense_decode", query.device.type).load()
    run(query, pages, block_table, seq_lens, scale=scale, out=out, sinks=sinks, soft_cap=soft_cap)


def check_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> None:
    """The arguments that every decode op shares."""
    check_heads("query", query, pages, multiple_of_kv_heads=True)
    check_heads("out", out, pages, multiple_of_kv_heads=True)
    require(out.shape == query.shape, f"out must be {tuple(query.shape)} like query, got {tuple(out.shape)}")
    check_table(block_table, query.shape[0], seq_lens=seq_lens)
    check_softmax(query, sinks, soft_cap)
