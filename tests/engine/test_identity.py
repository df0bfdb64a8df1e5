"""With nothing left out, SparQ is dense attention: greedy tokens equal those of vLLM's own backend, on every prompt."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts, rarely

pytestmark = pytest.mark.engine

N_PROMPTS = 32
READS = {
    "full sparq": EXACT["full"],
    "full sparq, where a mass has nothing to leave out": EXACT["full"] | {"mass": 0.5},
    "full spans": EXACT["full spans"],
    "full infllm": EXACT["full infllm"],
    "dense read": {"read": "dense"},
    # The scores never decide: every request is below its k, or every context below dense_below.
    "defaults below the break-even": {"dense_below": 5000},
    # Scores and positions are kept, prompts are taken in segments, and nobody reaches the budget.
    "heavy hitters, all of them": {
        "read": "dense",
        "retention": "heavy_hitter",
        "budget": 5000,
        "prefill": "bounded",
    },
    "window, all of them": {"read": "dense", "retention": "window", "budget": 5000, "prefill": "bounded"},
}


@pytest.fixture(scope="module")
def spread(prompts: Prompts) -> list[list[int]]:
    """Lengths 1 to 4096 minus the answer, evenly spread on a logarithmic scale, in random order."""
    rng = random.Random(3)
    lengths = [round(4080 ** (i / (N_PROMPTS - 1))) for i in range(N_PROMPTS)]
    rng.shuffle(lengths)
    return [prompts.of_length(n) for n in lengths]


@pytest.fixture(scope="module")
def dense_answers(spread: list[list[int]], engine: Any, prompts: Prompts) -> list[list[int]]:
    with engine("CPU_ATTN") as llm:
        return prompts.answers(llm, spread, n_tokens=16)


@pytest.mark.parametrize("read", rarely(READS, "dense read", "full sparq, where a mass has nothing to leave out"))
def test_equals_dense(
    read: str, spread: list[list[int]], dense_answers: list[list[int]], engine: Any, prompts: Prompts
) -> None:
    with engine("sparq", READS[read], max_num_batched_tokens=1024) as llm:
        answers = prompts.answers(llm, spread, n_tokens=16)
    different = [len(p) for p, a, d in zip(spread, answers, dense_answers, strict=True) if a != d]
    assert not different, f"{N_PROMPTS - len(different)} of {N_PROMPTS} equal; prompts of {different} tokens differ"
