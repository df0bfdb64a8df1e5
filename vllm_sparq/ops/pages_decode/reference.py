"""The specification of `vllm_sparq.ops.pages_decode.pages_decode`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.config import RETRIEVAL_TOKENS, PagesRead
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import attend, cached_tokens
from vllm_sparq.ops.write.reference import block_tokens, span_bounds


def pages_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: PagesRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    n_kv_heads = pages.data.shape[1]
    for b in range(query.shape[0]):
        context_len = int(seq_lens[b])
        if context_len == 0:
            out[b] = 0
            continue
        heads, heads_out = query[b].unflatten(0, (n_kv_heads, -1)), out[b].unflatten(0, (n_kv_heads, -1))
        for head in range(n_kv_heads):
            q = heads[head].float()  # [H/G, D]
            keys, values = cached_tokens(pages, block_table[b], context_len, head)
            if read.is_dense(context_len):
                heads_out[head] = attend(q, keys, values, scale)
                continue
            bounds = bounds_of(pages, block_table[b], context_len, head)
            spans = pick_spans(upper_bounds(q, bounds), read.n_spans(context_len))
            tokens = tokens_of(spans, context_len)
            heads_out[head] = attend(q, keys[tokens], values[tokens], scale)


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
            bounds.append(pages.scoring[int(blocks[block]), head])
    return torch.cat(bounds).float()


def upper_bounds(q: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Step 2: fp32 [spans], for the group q [H/G, D] and bounds [spans, 2, D]."""
    low, high = bounds.unbind(1)
    return high @ q.clamp(min=0).sum(0) + low @ q.clamp(max=0).sum(0)


def pick_spans(upper: torch.Tensor, n_spans: int) -> torch.Tensor:
    """Step 3: int64 [n_spans] ascending, from what no logit of each span exceeds [spans]."""
    best = upper[:-1].sort(descending=True, stable=True).indices[: n_spans - 1]
    newest = torch.tensor([len(upper) - 1], device=upper.device)
    return torch.cat([best.sort().values, newest])


def tokens_of(spans: torch.Tensor, context_len: int) -> torch.Tensor:
    """int64, ascending: the tokens of these spans that exist."""
    tokens = (spans[:, None] * RETRIEVAL_TOKENS + torch.arange(RETRIEVAL_TOKENS, device=spans.device)).flatten()
    return tokens[tokens < context_len]
