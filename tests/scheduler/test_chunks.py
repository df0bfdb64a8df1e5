"""Cached prefixes of layers that attend within chunks, beside layers whose blocks are longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparq.scheduler.manager import ChunksManager
from vllm_sparq.scheduler.spec import ChunksSpec

SIZE, CHUNK, ALIGNMENT = 32, 256, 128
SPEC = ChunksSpec(block_size=SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32, attention_chunk_size=CHUNK)


class Pool:
    """Blocks of two groups that are cached, by number; a hash is the number of its block."""

    hash_block_size = SIZE
    null_block = None

    def __init__(self, cached: Sequence[bool]) -> None:
        self.cached, self.n_asked = cached, 0

    def get_cached_block(self, number: int, group_ids: list[int]) -> list[Any] | None:
        self.n_asked += 1
        return [(group, number) for group in group_ids] if self.cached[number] else None


def found(pool: Any, max_length: int, *, drop: bool = False) -> tuple[tuple[list[Any], ...], int]:
    hashes: Any = list(range(len(pool.cached)))
    return ChunksManager.find_longest_cache_hit(hashes, max_length, [4, 7], pool, SPEC, drop, ALIGNMENT)


@given(st.lists(st.booleans(), min_size=24, max_size=24), st.integers(0, 24 * SIZE))
def test_it_is_the_longest_prefix_whose_last_chunk_is_cached(cached: list[bool], max_length: int) -> None:
    def serves(length: int) -> bool:
        return all(cached[i] for i in range(length // CHUNK * CHUNK // SIZE, length // SIZE))

    longest = max(n for n in range(0, max_length + 1, ALIGNMENT) if serves(n))
    pool = Pool(cached)
    blocks, length = found(pool, max_length)
    assert length == longest
    assert [len(of_group) for of_group in blocks] == [longest // SIZE] * 2
    first = longest // CHUNK * CHUNK // SIZE
    for group, of_group in zip((4, 7), blocks, strict=True):
        assert of_group == [None] * first + [(group, i) for i in range(first, longest // SIZE)]
    assert pool.n_asked <= 2 * len(cached)


def test_what_reads_the_last_block_again_is_refused() -> None:
    with pytest.raises(ValueError, match="leave --speculative-config out"):
        found(Pool([True] * 24), 24 * SIZE, drop=True)
