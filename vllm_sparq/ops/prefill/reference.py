"""The specification of `vllm_sparq.ops.prefill.prefill`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import decode_page
from vllm_sparq.ops.dense_decode.reference import add_scores, capped, probabilities
from vllm_sparq.ops.write.reference import block_tokens


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
    key_starts = query_start_loc if key_start_loc is None else key_start_loc
    n_kv_heads = key.shape[1]
    of_groups = [None] * n_kv_heads if sinks is None else sinks.unflatten(0, (n_kv_heads, -1))
    for b in range(len(query_start_loc) - 1):
        rows = slice(int(query_start_loc[b]), int(query_start_loc[b + 1]))
        new = slice(int(key_starts[b]), int(key_starts[b + 1]))
        context_len = int(context_lens[b])
        heads = query[rows].unflatten(1, (n_kv_heads, -1))  # [T', G, H/G, D]
        heads_out = out[rows].unflatten(1, (n_kv_heads, -1))
        for head in range(n_kv_heads):
            cached_keys, cached_values = context_tokens(pages, block_table[b], context_len, head)
            keys = torch.cat([cached_keys, key[new, head].float()])  # [S, D]
            values = torch.cat([cached_values, value[new, head].float()])
            logits = capped(scale * torch.einsum("thd,sd->hts", heads[:, head].float(), keys), soft_cap)
            n_queries = logits.shape[1]
            visible = torch.ones(n_queries, len(keys), dtype=torch.bool).tril(len(keys) - n_queries)
            logits = logits.masked_fill(~visible.to(logits.device), -torch.inf)
            weights, _ = probabilities(logits, of_groups[head])
            heads_out[:, head] = torch.einsum("hts,sd->thd", weights, values)
            add_scores(pages, block_table[b], head, weights.sum(1))


def context_tokens(
    pages: Pages, blocks: torch.Tensor, context_len: int, head: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, fp32 [context_len, D], of the tokens before the new ones; of quantized pages, whole blocks only."""
    block_size, quantized = pages.layout.block_size, pages.layout.quantized is not None
    tokens = [
        decode_page(pages, int(blocks[block]), head) if quantized else block_tokens(pages, blocks, block, head)
        for block in range(-(-context_len // block_size))
    ]
    if not tokens:
        none = torch.empty(0, pages.layout.head_size, device=pages.data.device)
        return none, none
    keys, values = (torch.cat([pair[i].float() for pair in tokens])[:context_len] for i in (0, 1))
    return keys, values
