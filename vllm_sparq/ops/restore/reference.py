"""The specification of `vllm_sparq.ops.restore.restore`: one request, one block and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import decode_page


def restore(
    pages: Pages,
    block_table: torch.Tensor,
    n_blocks: torch.Tensor,
    first_pages: torch.Tensor,
    *,
    most_blocks: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    for b, (n, first) in enumerate(zip(n_blocks.tolist(), first_pages.tolist(), strict=False)):
        for block in range(min(n, most_blocks)):
            for head in range(pages.data.shape[1]):
                key, value = decode_page(pages, int(block_table[b, block]), head)
                keys[first + block, :, head] = key.to(keys.dtype)
                values[first + block, :, head] = value.to(values.dtype)
