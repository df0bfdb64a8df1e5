"""`vllm_sparq.ops.quest_decode.quest_decode` in C++: csrc/quest_decode.cpp."""

from __future__ import annotations

import functools

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
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    native.function("sparq_quest_decode")(
        native.pages_struct(pages),
        native.tensor(query),
        native.tensor(out),
        native.requests(block_table, seq_lens, query.shape[0]),
        native.logits(scale, sinks, soft_cap),
        read_struct(read),
    )


@functools.lru_cache(maxsize=256)
def read_struct(read: SpansRead) -> native.SpansReadStruct:
    """A read as C++ takes it."""
    return native.SpansReadStruct(
        read.min_k,
        *read.k_per_token.as_integer_ratio(),
        read.dense_below,
        read.least,
        read.n_first,
        read.least_newest,
        -1 if read.local is None else read.local,
    )
