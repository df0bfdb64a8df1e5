"""`vllm_sparq.ops.represent.represent` in C++: csrc/represent.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native


def represent(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    native.function("sparq_represent")(
        native.pages_struct(pages),
        native.tensor(query),
        native.requests(block_table, seq_lens, query_start_loc.shape[0] - 1),
        query_start_loc.data_ptr(),
    )
