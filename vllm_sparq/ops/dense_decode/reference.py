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
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    for row in decode_rows(query, pages, block_table, seq_lens, out, sinks):
        weights, _ = probabilities(capped(scale * row.q @ row.keys.T, soft_cap), row.sinks)
        row.out[:] = weights @ row.values
        add_scores(pages, row.blocks, row.head, weights)


@dataclass(frozen=True)
class DecodeRow:
    """One request and one KV head of a decode step: q fp32 [H/G, D], keys and values fp32 [S, D], out [H/G, D].

    ``sinks`` fp32 [H/G], or None.
    """

    blocks: torch.Tensor  # int32 [M]
    context_len: int
    head: int
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor
    sinks: torch.Tensor | None


def decode_rows(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> Iterator[DecodeRow]:
    """What a decode op works on, for every request and KV head; the outputs of padding rows become zero."""
    n_kv_heads = pages.data.shape[1]
    of_groups = [None] * n_kv_heads if sinks is None else sinks.unflatten(0, (n_kv_heads, -1))
    for b in range(query.shape[0]):
        context_len, blocks = int(seq_lens[b]), block_table[b]
        if context_len == 0:
            out[b] = 0
            continue
        heads, heads_out = query[b].unflatten(0, (n_kv_heads, -1)), out[b].unflatten(0, (n_kv_heads, -1))
        for head in range(n_kv_heads):
            keys, values = cached_tokens(pages, blocks, context_len, head)
            q = heads[head].float()
            yield DecodeRow(blocks, context_len, head, q, keys, values, heads_out[head], of_groups[head])


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


def probabilities(logits: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of logits [H', .., S] over the tokens and, with ``sinks`` [H'], one more logit of each head.

    Returns the probabilities of the tokens, and what the sink takes of each row [H', .., 1]: zero without sinks.
    """
    if sinks is None:
        weights = torch.softmax(logits, dim=-1)
        return weights, torch.zeros_like(weights[..., :1])
    own = sinks.reshape(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    weights = torch.softmax(torch.cat([own, logits], dim=-1), dim=-1)
    return weights[..., 1:], weights[..., :1]


def capped(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Softmax attention of query [H', D] over keys and values [S, D], and over ``sinks`` [H'] or None; all fp32."""
    return probabilities(capped(scale * query @ keys.T, soft_cap), sinks)[0] @ values
