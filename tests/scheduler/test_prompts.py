"""What is told apart about prompts without an engine: one token at a time, and how far decoding reads everything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparq.config import Options
from vllm_sparq.reads import HeadShape
from vllm_sparq.scheduler.prompts import PromptCachingMixin, TokenLoops

HEADS = HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
LIMIT = 3000


def request(prompt: list[int], max_tokens: int = 1) -> Any:
    return SimpleNamespace(prompt_token_ids=prompt, max_tokens=max_tokens)


def test_a_client_that_asks_token_by_token_is_found() -> None:
    loops, prompt = TokenLoops(), list(range(100))
    found = [loops.found_by(request([*prompt, *range(i)])) for i in range(20)]
    assert found == [False] * (TokenLoops.ENOUGH - 1) + [True] * (21 - TokenLoops.ENOUGH)


def test_beams_are_found_beside_others() -> None:
    """Each step asks for every beam; and other clients come in between."""
    loops, found = TokenLoops(), []
    for i in range(20):
        found += [loops.found_by(request([*range(50), *[beam] * i])) for beam in (7, 8)]
        found += [loops.found_by(request([i] * (30 + j), max_tokens=1 + j % 2)) for j in (1, 5, 9)]
    assert found.count(True) == 2 * (21 - TokenLoops.ENOUGH)


def test_others_are_not() -> None:
    loops = TokenLoops()
    for i in range(200):
        assert not loops.found_by(request(list(range(100 + i)), max_tokens=2))
        assert not loops.found_by(request([5] * 64))  # the same question again and again
        assert not loops.found_by(request([i] * (100 + i)))  # one token longer, and different from the first on
        assert not loops.found_by(SimpleNamespace(prompt_token_ids=None, max_tokens=1))  # type: ignore[arg-type]
    assert len(loops.steps) <= TokenLoops.REMEMBERED


def test_what_vllm_says_of_a_hit_is_passed_on() -> None:
    """0.33 limits how long a hit may be; 0.32 says nothing of it."""
    asked: list[tuple[list[int], tuple[int, ...]]] = []
    scheduler: Any = object.__new__(PromptCachingMixin)
    scheduler._shares_all = True
    scheduler.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(hash_block_size=16))
    scheduler._lookup = lambda request, *limits: asked.append((request.block_hashes, limits))
    running = SimpleNamespace(block_hashes=[1, 2, 3], num_tokens=40)
    scheduler._computed_blocks(running)
    scheduler._computed_blocks(running, 7)
    assert asked == [([1, 2], ()), ([1, 2], (7,))]
    assert running.block_hashes == [1, 2, 3]


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
