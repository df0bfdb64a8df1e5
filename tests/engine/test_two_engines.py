"""Two engines in one process, of different options, in turns: each answers as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts

pytestmark = pytest.mark.engine

PAIRS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "h2o, twice": (("h2o", {"budget": 256}), ("h2o", {"budget": 128, "recent": 64})),
    "sparq and quest": (("sparq", EXACT["sparse"]), ("quest", {**EXACT["sparse spans"], "dense_layers": 0})),
    "kivi and streaming": (("kivi", {"format": "kivi2"}), ("streaming", {"budget": 200, "prefill": "bounded"})),
    "flexgen and h2o over codes": (
        ("flexgen", {}),
        ("h2o", {"format": "int8", "budget": 384, "recent": 64, "read": "sparq", "k": 32, "dense_below": 0}),
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


@pytest.mark.parametrize("pair", PAIRS)
def test_each_answers_as_alone(
    pair: str, questions: list[list[int]], engine: Any, engines: ExitStack, prompts: Prompts
) -> None:
    (first_name, first_options), (second_name, second_options) = PAIRS[pair]
    first = engines.enter_context(engine(first_name, first_options, **SMALL))
    first_alone = prompts.answers(first, questions, n_tokens=40)
    second = engines.enter_context(engine(second_name, second_options, **SMALL))
    second_alone = prompts.answers(second, questions, n_tokens=40)
    assert first_alone != second_alone
    assert prompts.answers(first, questions, n_tokens=40) == first_alone
    assert prompts.answers(second, questions[::-1], n_tokens=40) == second_alone[::-1]
    assert prompts.answers(first, questions[::-1], n_tokens=40) == first_alone[::-1]
