"""`vllm_sparq.ops.dense_decode.dense_decode` on a GPU: flash decoding over pages, two launches, or three with scores.

Moves ``2 D`` elements per token and KV head, or the codes and scales of quantized ones, which is all there is to read;
the merge adds ``8 D`` bytes per split. Where pages have `attention`, the logits are kept, 8 bytes per token and query
head there and back: less than K a second time. A batch whose logits would exceed `SCRATCH_BYTES` runs in slices.
"""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.attend import attend
from vllm_sparq.ops.triton_common.attention_scores import track_attention
from vllm_sparq.ops.triton_common.launch import slices
from vllm_sparq.ops.triton_common.merge import merge


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
    layout, (n_requests, n_heads, _) = pages.layout, query.shape
    max_tokens = block_table.shape[1] * layout.block_size
    if n_requests == 0:
        return
    if not layout.attention:
        decode_slice(query, pages, block_table, seq_lens, scale, out, max_tokens, sinks, soft_cap)
        return
    for rows in slices(n_requests, 4 * n_requests * n_heads * max_tokens):
        decode_slice(
            query[rows], pages, block_table[rows], seq_lens[rows], scale, out[rows], max_tokens, sinks, soft_cap
        )


def decode_slice(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_tokens: int,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> None:
    """The requests whose logits fit at once; all of them where none are kept."""
    n_rows, logits = query.shape[0] * query.shape[1], None
    if pages.layout.attention:
        logits = torch.empty(n_rows, max_tokens, dtype=torch.float32, device=query.device)
    shared = pages, block_table, seq_lens
    partial, weight = attend(
        query, *shared, scale=scale, out=out, max_tokens=max_tokens, logits=logits, sinks=sinks, soft_cap=soft_cap
    )
    if partial.shape[1]:
        merge(partial, weight, out)
    if logits is not None:
        track_attention(*shared, logits, weight)
