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
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    native.function("sparq_dense_decode")(
        native.pages_struct(pages),
        native.tensor(query),
        native.tensor(out),
        native.requests(block_table, seq_lens, query.shape[0]),
        native.logits(scale, sinks, soft_cap),
    )
