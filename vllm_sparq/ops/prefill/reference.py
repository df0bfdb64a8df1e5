"""The specification of `vllm_sparq.ops.prefill.prefill`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import cached_tokens


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
) -> None:
    n_kv_heads = key.shape[1]
    for b in range(len(query_start_loc) - 1):
        rows = slice(int(query_start_loc[b]), int(query_start_loc[b + 1]))
        context_len = int(context_lens[b])
        heads = query[rows].unflatten(1, (n_kv_heads, -1))  # [T', G, H/G, D]
        heads_out = out[rows].unflatten(1, (n_kv_heads, -1))
        for head in range(n_kv_heads):
            cached_keys, cached_values = cached_tokens(pages, block_table[b], context_len, head)
            keys = torch.cat([cached_keys, key[rows, head].float()])  # [S, D]
            values = torch.cat([cached_values, value[rows, head].float()])
            logits = scale * torch.einsum("thd,sd->hts", heads[:, head].float(), keys)
            n_new = logits.shape[1]
            visible = torch.ones(n_new, len(keys), dtype=torch.bool).tril(context_len)
            weights = torch.softmax(logits.masked_fill(~visible.to(logits.device), -torch.inf), dim=-1)
            heads_out[:, head] = torch.einsum("hts,sd->thd", weights, values)
