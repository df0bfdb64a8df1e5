"""`vllm_sparq.ops.dense_decode.dense_decode` on a GPU: flash decoding over pages, at most two launches.

Moves ``2 D`` elements per token and KV head, or the codes and ranges of quantized ones, which is all there is to read;
the merge adds ``8 D`` bytes per split.
"""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_attend import attend
from vllm_sparq.ops.triton_common import merge


def dense_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    if query.shape[0] == 0:
        return
    max_tokens = block_table.shape[1] * pages.layout.block_size
    split = attend(query, pages, block_table, seq_lens, scale=scale, out=out, max_tokens=max_tokens)
    if split is not None:
        merge(*split, out)
