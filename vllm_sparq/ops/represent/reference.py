"""The specification of `vllm_sparq.ops.represent.represent`: one request, one KV head and one token at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.represent import query_sums
from vllm_sparq.reads.infllm import REPRESENTATIVES, WINDOW_SPANS
from vllm_sparq.reads.spans import SPAN_TOKENS


def represent(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    n_kv_heads = pages.data.shape[1]
    for b in range(len(query_start_loc) - 1):
        start, stop = int(query_start_loc[b]), int(query_start_loc[b + 1])
        first = int(seq_lens[b]) - (stop - start)
        for head in range(n_kv_heads):
            for row in range(start, stop):
                token = first + row - start
                if token < 0:
                    continue  # padding
                heads = query[row].unflatten(0, (n_kv_heads, -1))[head]  # [H/G, D]
                add_query(heads, pages, block_table[b], token, head)
                span = token // SPAN_TOKENS - WINDOW_SPANS
                if token % SPAN_TOKENS == SPAN_TOKENS - 1 and span >= 0:
                    choose_representatives(pages, block_table[b], span, head)


def place(pages: Pages, blocks: torch.Tensor, span: int) -> tuple[int, int]:
    """Page of a span, and its place there; ``blocks`` is int32 [M]."""
    block, within = divmod(span, pages.layout.block_size // SPAN_TOKENS)
    return int(blocks[block]), within


def add_query(heads: torch.Tensor, pages: Pages, blocks: torch.Tensor, token: int, head: int) -> None:
    """Step 1, for the queries [H/G, D] of a token's group."""
    page, span = place(pages, blocks, token // SPAN_TOKENS)
    own = torch.zeros_like(heads[0], dtype=torch.float32)
    for one in heads.float():
        own = own + one
    opens = token % SPAN_TOKENS == 0
    query_sums(pages)[page, head, span] = own if opens else query_sums(pages)[page, head, span] + own


def choose_representatives(pages: Pages, blocks: torch.Tensor, span: int, head: int) -> None:
    """Step 2, for a span whose window is full."""
    window = torch.zeros_like(query_sums(pages)[0, head, 0])
    for ahead in range(1, WINDOW_SPANS + 1):
        page, within = place(pages, blocks, span + ahead)
        window = window + query_sums(pages)[page, head, within]
    page, within = place(pages, blocks, span)
    keys = pages.keys[page, head, within * SPAN_TOKENS : (within + 1) * SPAN_TOKENS].float()
    scores = keys @ window
    scores = torch.where(scores.isfinite(), scores, -torch.inf)
    chosen = keys[scores.sort(descending=True, stable=True).indices[:REPRESENTATIVES].sort().values]
    pages.ranking[page, head, within] = torch.where(chosen.isfinite(), chosen, 0.0).mean(0).to(pages.layout.dtype)
