"""`vllm_sparq.ops.quest_decode.quest_decode` in C++: csrc/quest_decode.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native
from vllm_sparq.reads import SpansRead


def quest_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SpansRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    native.function("sparq_quest_decode")(
        native.pages_address(pages),
        *native.heads(query),
        *native.heads(out),
        *query.shape[:2],
        block_table.data_ptr(),
        block_table.stride(0),
        seq_lens.data_ptr(),
        scale,
        read.min_k,
        *read.k_per_token.as_integer_ratio(),
        read.dense_below,
    )
