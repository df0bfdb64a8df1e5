"""`vllm_sparq.ops.evict.evict` in C++: csrc/evict.cpp."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native
from vllm_sparq.retention import Rank


def evict(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kept_lens: torch.Tensor,
    recent_from: torch.Tensor,
    *,
    sinks: int,
    rank: Rank,
    most_kept: int | None = None,
) -> None:
    native.function("sparq_evict")(
        native.pages_struct(pages),
        native.requests(block_table, seq_lens, seq_lens.shape[0]),
        kept_lens.data_ptr(),
        recent_from.data_ptr(),
        sinks,
        native.Rank[rank],
    )
