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
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    native.function("sparq_prefill")(
        native.pages_struct(pages),
        *(native.tensor(x) for x in (query, key, value, out)),
        native.requests(block_table, context_lens, query_start_loc.shape[0] - 1),
        query_start_loc.data_ptr(),
        (query_start_loc if key_start_loc is None else key_start_loc).data_ptr(),
        native.logits(scale, sinks, soft_cap),
    )
