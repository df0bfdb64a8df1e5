"""The specification of `vllm_sparq.ops.quest_decode.quest_decode`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import attend, decode_rows
from vllm_sparq.ops.write.reference import block_tokens, span_bounds
from vllm_sparq.reads import SPAN_TOKENS, SpansRead, spans_of


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
    for row in decode_rows(query, pages, block_table, seq_lens, out, sinks):
        q, keys, values = row.q, row.keys, row.values
        if not read.is_dense(row.context_len):
            if read.ranked_by == "bounds":
                bounds = bounds_of(pages, row.blocks, row.context_len, row.head)
            else:
                bounds = representatives_of(pages, row.blocks, row.context_len, row.head)
            spans = pick_spans(upper_bounds(q, bounds), read, row.context_len)
            tokens = tokens_of(spans, row.context_len)
            keys, values = keys[tokens], values[tokens]
        row.out[:] = attend(q, keys, values, scale, row.sinks, soft_cap)


def bounds_of(pages: Pages, blocks: torch.Tensor, context_len: int, head: int) -> torch.Tensor:
    """Step 1: fp32 [spans, 2, D], the least and the largest K of each span; ``blocks`` is int32 [M]."""
    n, quantized = pages.layout.block_size, pages.layout.quantized is not None
    bounds = []
    for block in range(-(-context_len // n)):
        n_tokens = min(n, context_len - block * n)
        newest = block == (context_len - 1) // n
        if n_tokens < n or (quantized and newest):
            bounds.append(span_bounds(block_tokens(pages, blocks, block, head)[0][:n_tokens]))
        else:
            bounds.append(pages.ranking[int(blocks[block]), head])
    return torch.cat(bounds).float()


def representatives_of(pages: Pages, blocks: torch.Tensor, context_len: int, head: int) -> torch.Tensor:
    """The same for representatives; garbage for spans that have none yet, which are not ranked."""
    spans = pages.ranking[blocks[: -(-context_len // pages.layout.block_size)].long(), head].flatten(0, 1)
    return spans[: spans_of(context_len)].float()


def upper_bounds(q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Step 2: fp32 [spans], for the group q [H/G, D] and bounds [spans, 2, D]."""
    low, high = bounds.unbind(1)
    return high @ q.clamp(min=0).sum(0) + low @ q.clamp(max=0).sum(0)


def pick_spans(upper: torch.Tensor, read: SpansRead, context_len: int) -> torch.Tensor:
    """Step 3: int64 [n_spans] ascending, from what no logit of each span exceeds [spans]."""
    n_newest = read.n_newest(context_len)
    n_best = read.n_spans(context_len) - read.n_first - n_newest
    ends = [read.n_first, len(upper) - n_newest]
    first, ranked, newest = torch.arange(len(upper), device=upper.device).tensor_split(ends)
    best = ranked[upper[ranked].sort(descending=True, stable=True).indices[:n_best]]
    return torch.cat([first, best.sort().values, newest])


def tokens_of(spans: torch.Tensor, context_len: int) -> torch.Tensor:
    """int64, ascending: the tokens of these spans that exist."""
    tokens = (spans[:, None] * SPAN_TOKENS + torch.arange(SPAN_TOKENS, device=spans.device)).flatten()
    return tokens[tokens < context_len]
