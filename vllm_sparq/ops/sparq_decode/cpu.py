"""`vllm_sparq.ops.sparq_decode.sparq_decode` in C++: csrc/sparq_decode.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native
from vllm_sparq.reads import SparqRead


def sparq_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    native.function("sparq_sparq_decode")(
        native.pages_address(pages),
        *native.heads(query),
        *native.heads(out),
        *query.shape[:2],
        block_table.data_ptr(),
        block_table.stride(0),
        seq_lens.data_ptr(),
        scale,
        read.r,
        read.min_k,
        *read.k_per_token.as_integer_ratio(),
        -1 if read.local is None else read.local,
        read.dense_below,
        read.alpha_floor,
        read.group_reduce == "probs",
        1.0 if read.mass is None else read.mass,
        read.least_k,
    )
