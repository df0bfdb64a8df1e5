"""`vllm_sparq.ops.write.write` in C++: csrc/write.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> None:
    requests = native.requests(block_table, seq_lens, query_start_loc.shape[0] - 1)
    native.function("sparq_write")(
        native.pages_struct(pages),
        native.tensor(key),
        native.tensor(value),
        requests,
        query_start_loc.data_ptr(),
        None if first_positions is None else first_positions.data_ptr(),
    )
