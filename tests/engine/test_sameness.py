"""A request answers the same however the engine runs it: the promise behind everything vLLM does with blocks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts, assert_preemption_does_not_matter

pytestmark = pytest.mark.engine

RUNS: dict[str, dict[str, Any]] = {
    "in one batch": {},
    "chunks of 64": dict(max_num_batched_tokens=64, max_num_seqs=8),
    "chunks of 256": dict(max_num_batched_tokens=256),
    "prefix caching": dict(enable_prefix_caching=True, max_num_batched_tokens=256),
    "compiled": dict(enforce_eager=False),
    "blocks of 32": dict(block_size=32),
}


def test_sparse_reading_matters(engine: Any, prompts: Prompts, sparse_alone: dict[int, list[int]]) -> None:
    """The yardstick is worth something: dense answers differ from it, so the reads really are sparse."""
    with engine("CPU_ATTN") as llm:
        dense = prompts.answers(llm, prompts.mixed)
    assert dense[0] == sparse_alone[0]  # one token of context: nothing to leave out
    assert sum(dense[i] != sparse_alone[i] for i in range(len(dense))) >= 3


@pytest.mark.parametrize("run", [run for run in RUNS if run != "blocks of 32"])
def test_same_answers(run: str, engine: Any, prompts: Prompts, sparse_alone: dict[int, list[int]]) -> None:
    with engine("sparq", EXACT["sparse"], **RUNS[run]) as llm:
        assert prompts.answers(llm, prompts.mixed) == list(sparse_alone.values())
        if run == "prefix caching":
            assert prompts.answers(llm, prompts.mixed) == list(sparse_alone.values()), "from cached blocks"


def test_a_mass_is_the_same_share_however_it_runs(
    engine: Any, prompts: Prompts, sparse_alone: dict[int, list[int]]
) -> None:
    """How many tokens a request reads depends on its own scores alone: in a batch, in chunks, from cached blocks."""
    answers = {}
    with engine("sparq", EXACT["mass"]) as llm:
        alone = prompts.alone(llm, prompts.mixed)
        answers["in one batch"] = prompts.answers(llm, prompts.mixed)
    for run in ("chunks of 64", "prefix caching"):
        with engine("sparq", EXACT["mass"], **RUNS[run]) as llm:
            answers[run] = prompts.answers(llm, prompts.mixed)
            if run == "prefix caching":
                answers["from cached blocks"] = prompts.answers(llm, prompts.mixed)
    assert answers == dict.fromkeys(answers, alone)
    assert sum(a != b for a, b in zip(alone, sparse_alone.values(), strict=True)) >= 3


def test_prefix_cache_is_hit(engine: Any, prompts: Prompts) -> None:
    """As many hits as dense attention gets on the same requests."""
    hits = {}
    for backend, options in (("sparq", EXACT["sparse"]), ("CPU_ATTN", None)):
        with engine(backend, options, enable_prefix_caching=True, disable_log_stats=False, block_size=128) as llm:
            prompts.answers(llm, prompts.mixed)
            prompts.answers(llm, prompts.mixed)
            metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
            hits[backend] = metrics["vllm:prefix_cache_hits"]
    assert hits["sparq"] == hits["CPU_ATTN"] > 1000


@pytest.mark.parametrize("fmt", ["model", "int4"])
def test_equal_beginnings_in_one_step(fmt: str, engine: Any, prompts: Prompts) -> None:
    """Requests that come together share the blocks they begin with before any of those is computed."""
    long, other = prompts.of_length(900), prompts.of_length(200)
    family = [long, long, long[:600] + other, long[:700], long[:130] + other]
    with engine("sparq", EXACT["sparse"] | {"format": fmt}, enable_prefix_caching=True) as llm:
        together = prompts.answers(llm, family)
        for prompt, answer in zip(family, together, strict=True):
            assert llm.reset_prefix_cache()
            assert prompts.answers(llm, [prompt]) == [answer]


def test_preemption(engine: Any) -> None:
    """A pool that cannot hold all requests: some are thrown out in the middle of an answer, and come back.

    Their output tokens are computed again, several at once. Random prompts make the answers so sensitive that reading
    those tokens densely, or at a wrong length, changes what follows.
    """
    assert_preemption_does_not_matter(engine, "sparq", EXACT["sparse"])
