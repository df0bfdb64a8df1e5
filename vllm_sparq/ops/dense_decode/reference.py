"""The specification of `vllm_sparq.ops.dense_decode.dense_decode`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import decode_page
from vllm_sparq.ops.write.reference import block_tokens


def dense_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
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
            keys, values = cached_tokens(pages, block_table[b], context_len, head)
            weights = torch.softmax(scale * heads[head].float() @ keys.T, dim=-1)
            heads_out[head] = weights @ values
            add_scores(pages, block_table[b], head, weights)


def cached_tokens(pages: Pages, blocks: torch.Tensor, context_len: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, fp32 [S, D], of one request's first ``context_len`` tokens for one KV head; ``blocks`` is int32 [M]."""
    keys, values = [], []
    last = (context_len - 1) // pages.layout.block_size
    for block in range(last + 1):
        if block < last and pages.layout.quantized is not None:
            k, v = decode_page(pages, int(blocks[block]), head)
        else:
            k, v = block_tokens(pages, blocks, block, head)
        keys.append(k.float())
        values.append(v.float())
    return torch.cat(keys)[:context_len], torch.cat(values)[:context_len]


def add_scores(pages: Pages, blocks: torch.Tensor, head: int, weights: torch.Tensor) -> None:
    """Note the attention [H/G, S] that the first S tokens of a request get; ``blocks`` is int32 [M]."""
    if not pages.layout.scores:
        return
    slots = torch.arange(weights.shape[1], device=weights.device)
    page, place = blocks.long()[slots // pages.layout.block_size], slots % pages.layout.block_size
    pages.scores[page, head, place] += weights.mean(0)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of query [H', D] over keys and values [S, D], all fp32."""
    return torch.softmax(scale * query @ keys.T, dim=-1) @ values
