"""Engines of different options in one process, in turns: each answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts, rarely

pytestmark = pytest.mark.engine

Engine = tuple[str, dict[str, Any], dict[str, Any]]
"""A backend, its options, arguments of the engine."""


def one(backend: str, options: dict[str, Any], **arguments: Any) -> Engine:
    return backend, options, arguments


SPARSE, SPANS = EXACT["sparse"], EXACT["sparse spans"]
TOGETHER: dict[str, tuple[Engine, ...]] = {
    "h2o, twice": (one("h2o", {"budget": 256}), one("h2o", {"budget": 128, "recent": 64})),
    "sparq and quest": (one("sparq", SPARSE), one("quest", {**SPANS, "dense_layers": 0})),
    "kivi and streaming": (one("kivi", {"format": "kivi2"}), one("streaming", {"budget": 200, "prefill": "bounded"})),
    "flexgen and h2o over codes": (
        one("flexgen", {}),
        one("h2o", {"format": "int8", "budget": 384, "recent": 64, "read": "sparq", "k": 32, "dense_below": 0}),
    ),
    "lossless and mass": (one("sparq", {**SPARSE, "lossless": True}), one("sparq", EXACT["mass"])),
    "other positions, and evicting under pressure": (
        one("streaming", {"budget": 200, "prefill": "bounded", "positions": "renumbered"}),
        one("h2o", {"budget": 192, "pressure": "evict"}),
    ),
    "three, of blocks of other lengths": (
        one("sparq", SPARSE, block_size=32, enable_prefix_caching=True),
        one("sparq", {**SPANS, "format": "int4"}, block_size=64),
        one("h2o", {"budget": 192}, block_size=16),
    ),
}
SMALL = dict(kv_cache_memory_bytes=64 << 20, max_num_batched_tokens=256)


@pytest.fixture(scope="module")
def questions(prompts: Prompts) -> list[list[int]]:
    """Around the budgets and the block size, longer than a chunk."""
    return [prompts.of_length(n) for n in (100, 257, 700)]


@pytest.fixture(scope="module")
def engines() -> Iterator[ExitStack]:
    """Engines that stay until the module ends: vLLM takes its process group down with the first that is closed."""
    with ExitStack() as open_engines:
        yield open_engines


@pytest.mark.parametrize("names", rarely(TOGETHER, "kivi and streaming", "three, of blocks of other lengths"))
def test_each_answers_as_alone(
    names: str, questions: list[list[int]], engine: Any, engines: ExitStack, prompts: Prompts
) -> None:
    running, alone = [], []
    for backend, options, arguments in TOGETHER[names]:
        running.append(engines.enter_context(engine(backend, options, **SMALL, **arguments)))
        alone.append(prompts.answers(running[-1], questions, n_tokens=40))
    assert len({str(answers) for answers in alone}) == len(alone)
    for one_engine, answers in zip(running, alone, strict=True):
        assert prompts.answers(one_engine, questions, n_tokens=40) == answers
    for one_engine, answers in zip(running[::-1], alone[::-1], strict=True):
        assert prompts.answers(one_engine, questions[::-1], n_tokens=40) == answers[::-1]
