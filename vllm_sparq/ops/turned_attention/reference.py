"""The specification of `vllm_sparq.ops.turned_attention.turned_attention`: one row and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import cached_tokens, capped, probabilities


def turned_attention(
    query: torch.Tensor,
    turned: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    n_kv_heads, n_turned = pages.data.shape[1], turned.shape[1]
    of_groups = [None] * n_kv_heads if sinks is None else sinks.unflatten(0, (n_kv_heads, -1))
    for b in range(len(query_start_loc) - 1):
        first, stop = int(query_start_loc[b]), int(query_start_loc[b + 1])
        for row in range(first, stop):
            n_seen = int(seq_lens[b]) - (stop - 1 - row)
            if n_seen < 1:
                continue
            q, out_of_heads = (x[row].unflatten(0, (n_kv_heads, -1)) for x in (query, out))  # [G, H/G, D]
            of_slots = turned[row].unflatten(1, (n_kv_heads, -1))  # [n, G, H/G, D]
            for head in range(n_kv_heads):
                keys, values = cached_tokens(pages, block_table[b], n_seen, head)
                logits = q[head].float() @ keys.T
                for slot in range(min(n_turned, n_seen)):
                    logits[:, slot] = of_slots[slot, head] @ keys[slot]
                weights, _ = probabilities(capped(scale * logits, soft_cap), of_groups[head])
                out_of_heads[head] = weights @ values
