"""`vllm_sparq.ops.sparq_decode.sparq_decode` in C++: csrc/sparq_decode.cpp."""

from __future__ import annotations

import functools

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
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    native.function("sparq_sparq_decode")(
        native.pages_struct(pages),
        native.tensor(query),
        native.tensor(out),
        native.requests(block_table, seq_lens, query.shape[0]),
        native.logits(scale, sinks, soft_cap),
        read_struct(read),
    )


@functools.lru_cache(maxsize=256)
def read_struct(read: SparqRead) -> native.SparqReadStruct:
    """A read as C++ takes it."""
    slope, divisor = read.k_per_token.as_integer_ratio()
    return native.SparqReadStruct(
        min_k=read.min_k,
        slope=slope,
        slope_divisor=divisor,
        dense_below=read.dense_below,
        local=-1 if read.local is None else read.local,
        least_k=read.least_k,
        r=read.r,
        probs=read.group_reduce == "probs",
        alpha_floor=read.alpha_floor,
        mass=1.0 if read.mass is None else read.mass,
    )
