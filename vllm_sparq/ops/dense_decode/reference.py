"""The specification of `vllm_sparq.ops.dense_decode.dense_decode`: one request and one KV head at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    for row in decode_rows(query, pages, block_table, seq_lens, out):
        weights = torch.softmax(scale * row.q @ row.keys.T, dim=-1)
        row.out[:] = weights @ row.values
        add_scores(pages, row.blocks, row.head, weights)


@dataclass(frozen=True)
class DecodeRow:
    """One request and one KV head of a decode step: q fp32 [H/G, D], keys and values fp32 [S, D], out [H/G, D]."""

    blocks: torch.Tensor  # int32 [M]
    context_len: int
    head: int
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor


def decode_rows(
    query: torch.Tensor, pages: Pages, block_table: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor
) -> Iterator[DecodeRow]:
    """What a decode op works on, for every request and KV head; the outputs of padding rows become zero."""
    n_kv_heads = pages.data.shape[1]
    for b in range(query.shape[0]):
        context_len, blocks = int(seq_lens[b]), block_table[b]
        if context_len == 0:
            out[b] = 0
            continue
        heads, heads_out = query[b].unflatten(0, (n_kv_heads, -1)), out[b].unflatten(0, (n_kv_heads, -1))
        for head in range(n_kv_heads):
            keys, values = cached_tokens(pages, blocks, context_len, head)
            yield DecodeRow(blocks, context_len, head, heads[head].float(), keys, values, heads_out[head])


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
    if not pages.layout.attention:
        return
    slots = torch.arange(weights.shape[1], device=weights.device)
    page, place = blocks.long()[slots // pages.layout.block_size], slots % pages.layout.block_size
    pages.attention[page, head, place] += weights.mean(0)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of query [H', D] over keys and values [S, D], all fp32."""
    return torch.softmax(scale * query @ keys.T, dim=-1) @ values
