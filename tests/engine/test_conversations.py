"""Conversations: what a turn answers does not depend on which blocks of the turns before it are still cached."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", EXACT["sparse"]),
    "sparq over int4": ("sparq", {**EXACT["sparse"], "format": "int4"}),
    "quest": ("sparq", EXACT["sparse spans"]),
    "kivi": ("kivi", {}),
}
SHARING = ("kivi",)
"""Dense reads: what they decode is what a prompt would have written, so that all of it is shared."""


def tokens(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(n)]


def hits(llm: Any) -> float:
    return float(next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"))


@pytest.mark.parametrize("method", METHODS)
def test_a_turn_answers_alike_cold_and_warm(method: str, engine: Any) -> None:
    backend, options = METHODS[method]
    with engine(backend, options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 300)
        question = [*prompt, *Prompts.answers(llm, [prompt], 300)[0], *tokens(2, 40)]
        before = hits(llm)
        first = Prompts.answers(llm, [question])
        n_hits = hits(llm) - before
        assert llm.reset_prefix_cache()
        cold = Prompts.answers(llm, [question])
        assert Prompts.answers(llm, [question]) == cold == first
    assert n_hits == (576 if method in SHARING else 288)  # whole blocks of prompt and answer, or of the prompt


def test_decoded_blocks_are_shared_where_the_user_wants_it(engine: Any) -> None:
    options = {**EXACT["sparse"], "sharing": "all"}
    with engine("sparq", options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 300)
        question = [*prompt, *Prompts.answers(llm, [prompt], 300)[0], *tokens(2, 40)]
        before = hits(llm)
        first = Prompts.answers(llm, [question])
        assert hits(llm) - before == 576
        assert llm.reset_prefix_cache()
        assert Prompts.answers(llm, [question]) != first


def test_what_short_contexts_decode_is_shared(engine: Any) -> None:
    """Below `dense_below` a decode step reads everything, so that the blocks hold what a prompt would have written."""
    options = {**EXACT["sparse"], "dense_below": 480}
    with engine("sparq", options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 300)
        question = [*prompt, *Prompts.answers(llm, [prompt], 300)[0], *tokens(2, 40)]
        before = hits(llm)
        first = Prompts.answers(llm, [question])
        assert hits(llm) - before == 448  # 479 tokens are read densely
        assert llm.reset_prefix_cache()
        assert Prompts.answers(llm, [question]) == first


@pytest.mark.parametrize("method", ["sparq", "sparq over int4"])
def test_a_preempted_request_takes_no_prompt_for_its_answer(method: str, engine: Any) -> None:
    """While it waits, another's prompt fills the cache with the same tokens, as a prompt writes them."""
    from vllm import SamplingParams

    backend, options = METHODS[method]
    prompt = tokens(1, 300)
    common = dict(block_size=32, enable_prefix_caching=True, async_scheduling=False, max_num_seqs=2)
    with engine(backend, options, **common) as llm:
        answer = Prompts.answers(llm, [prompt], 300)[0]
        assert llm.reset_prefix_cache()
        core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
        params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, detokenize=False)
        core.add_request("a", {"prompt_token_ids": prompt}, params)
        said: list[int] = []
        while len(said) < 200:
            said = next(list(out.outputs[0].token_ids) for out in core.step())
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        core.add_request("b", {"prompt_token_ids": [*prompt, *answer[:200]]}, one)
        core.step()  # its blocks are cached from here on
        (request,) = (request for request in scheduler.running if request.num_prompt_tokens == 300)
        scheduler.running.remove(request)
        scheduler._preempt_request(request, 0.0)
        while core.has_unfinished_requests():
            for out in core.step():
                if out.request_id == "a":
                    said = list(out.outputs[0].token_ids)
    assert said == answer


def test_beam_search_is_told_that_it_reads_everything(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its steps is a prompt, to vLLM as to us. An ordinary answer is not."""
    from vllm.sampling_params import BeamSearchParams

    from vllm_sparq.scheduler import prompts

    said: list[str] = []
    monkeypatch.setattr(prompts.logger, "warning_once", said.append)
    with engine(*METHODS["sparq"], enable_prefix_caching=True) as llm:
        Prompts.answers(llm, [tokens(1, 40)], 40)
        assert not said
        llm.beam_search([{"prompt_token_ids": tokens(1, 40)}], BeamSearchParams(beam_width=2, max_tokens=20))
    assert said
    assert "one token at a time" in said[0]
