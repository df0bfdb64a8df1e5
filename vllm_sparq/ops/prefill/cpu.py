"""Calls csrc/prefill.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native


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
) -> None:
    table = block_table.data_ptr(), block_table.stride(0), context_lens.data_ptr()
    key_starts = query_start_loc if key_start_loc is None else key_start_loc
    rows = query_start_loc.data_ptr(), key_starts.data_ptr(), query_start_loc.shape[0] - 1, query.shape[1]
    tensors = *native.heads(query), *native.heads(key), *native.heads(value), *native.heads(out)
    call = native.function("sparq_prefill")
    call(native.pages_address(pages), *table, *rows, *tensors, scale)
