"""`vllm_sparq.ops.dense_decode.dense_decode` in C++: csrc/dense_decode.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native


def dense_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
) -> None:
    native.function("sparq_dense_decode")(
        native.pages_address(pages),
        *native.heads(query),
        *native.heads(out),
        *query.shape[:2],
        block_table.data_ptr(),
        block_table.stride(0),
        seq_lens.data_ptr(),
        scale,
    )
