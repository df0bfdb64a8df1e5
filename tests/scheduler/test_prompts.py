"""What is known about prompts without an engine: how far decoding reads everything."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparq.config import Options
from vllm_sparq.reads import HeadShape

HEADS = HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
LIMIT = 3000


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"read": "dense"}, LIMIT),
        ({"dense_below": 0, "k": 10}, 11),  # k cached tokens and the current one
        ({"dense_below": 500, "k": 10}, 499),
        ({"dense_below": 500, "k": 900}, 901),
        ({"dense_below": 5000}, LIMIT),
        ({}, 1023),
        ({"read": "spans", "dense_below": 0, "k": 1}, 48),
        ({"read": "spans", "dense_below": 0, "k": 100}, 96),
    ],
    ids=str,
)
def test_how_far_decoding_reads_everything(options: dict[str, Any], tokens: int) -> None:
    assert Options(**options).read_of(HEADS).dense_up_to(LIMIT) == tokens


@given(
    read=st.sampled_from(["sparq", "spans"]),
    compression=st.floats(1, 15.9),
    k=st.none() | st.integers(1, 400),
    dense_below=st.integers(0, 600),
)
def test_contexts_are_read_sparsely_from_one_length_on(
    read: Any, compression: float, k: int | None, dense_below: int
) -> None:
    chosen = Options(read=read, compression=compression, k=k, dense_below=dense_below).read_of(HEADS)
    tokens = chosen.dense_up_to(LIMIT)
    assert [chosen.is_dense(length) for length in range(1, LIMIT + 1)] == [True] * tokens + [False] * (LIMIT - tokens)
