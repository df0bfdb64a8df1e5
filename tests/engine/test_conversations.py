"""Conversations: what a turn answers does not depend on which blocks of the turns before it are still cached."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.support import EXACT, N_ANSWER, Prompts

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


def params(n_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False, logprobs=0)


def likely(output: Any) -> list[float]:
    """Log-probabilities of the tokens of an answer: they move where other K and V are read, whatever is said."""
    return [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]


def answer_of(llm: Any, prompt: list[int], n_tokens: int = N_ANSWER) -> Any:
    (found,) = llm.generate([{"prompt_token_ids": prompt}], params(n_tokens), use_tqdm=False)
    return found.outputs[0]


def about(output: Any) -> Any:
    """The same up to rounding, which depends on where a prompt is cut."""
    return pytest.approx(likely(output), abs=1e-3)


def hits(llm: Any) -> float:
    return float(next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"))


@pytest.mark.parametrize("method", METHODS)
def test_a_turn_answers_alike_cold_and_warm(method: str, engine: Any) -> None:
    backend, options = METHODS[method]
    with engine(backend, options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 150)
        question = [*prompt, *Prompts.answers(llm, [prompt], 150)[0], *tokens(2, 40)]
        before = hits(llm)
        first = answer_of(llm, question)
        n_hits = hits(llm) - before
        assert llm.reset_prefix_cache()
        cold = answer_of(llm, question)
        for again in (first, answer_of(llm, question)):
            assert again.token_ids == cold.token_ids
            assert likely(again) == about(cold)
    assert n_hits == (288 if method in SHARING else 128)  # whole blocks of prompt and answer, or of the prompt


def test_decoded_blocks_are_shared_where_the_user_wants_it(engine: Any) -> None:
    options = {**EXACT["sparse"], "sharing": "all"}
    with engine("sparq", options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 150)
        question = [*prompt, *Prompts.answers(llm, [prompt], 150)[0], *tokens(2, 40)]
        before = hits(llm)
        first = answer_of(llm, question)
        assert hits(llm) - before == 288
        assert llm.reset_prefix_cache()
        assert likely(answer_of(llm, question)) != about(first)


def test_what_short_contexts_decode_is_shared(engine: Any) -> None:
    """Below `dense_below` a decode step reads everything, so that the blocks hold what a prompt would have written."""
    options = {**EXACT["sparse"], "dense_below": 240}
    with engine("sparq", options, block_size=32, enable_prefix_caching=True, disable_log_stats=False) as llm:
        prompt = tokens(1, 150)
        question = [*prompt, *Prompts.answers(llm, [prompt], 150)[0], *tokens(2, 40)]
        before = hits(llm)
        first = answer_of(llm, question)
        assert hits(llm) - before == 224  # 239 tokens are read densely
        assert llm.reset_prefix_cache()
        assert likely(answer_of(llm, question)) == about(first)


@pytest.mark.parametrize("method", ["sparq", "sparq over int4"])
def test_a_preempted_request_takes_no_prompt_for_its_answer(method: str, engine: Any) -> None:
    """Another's prompt has filled the cache with the tokens of its answer, as a prompt writes them."""
    backend, options = METHODS[method]
    prompt = tokens(1, 150)
    with engine(backend, options, block_size=32, enable_prefix_caching=True, async_scheduling=False) as llm:
        alone = answer_of(llm, prompt, 150)
        assert llm.reset_prefix_cache()
        answer_of(llm, [*prompt, *alone.token_ids[:100]], 1)  # its blocks are cached from here on
        core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
        core.add_request("a", {"prompt_token_ids": prompt}, params(150))
        n_said, last = 0, None
        while core.has_unfinished_requests():
            for last in core.step():
                n_said = len(last.outputs[0].token_ids)
            if n_said == 100:
                (request,) = scheduler.running
                scheduler.running.remove(request)
                scheduler._preempt_request(request, 0.0)
    assert request.num_preemptions == 1
    assert last is not None
    assert list(last.outputs[0].token_ids) == list(alone.token_ids)
    assert likely(last.outputs[0]) == about(alone)


def test_beam_search_is_told_that_it_reads_everything(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its steps is a prompt, to vLLM as to us. An ordinary answer is not."""
    from vllm.sampling_params import BeamSearchParams

    from vllm_sparq.scheduler import prompts

    said: list[str] = []
    monkeypatch.setattr(prompts.logger, "warning_once", said.append)
    with engine(*METHODS["sparq"], enable_prefix_caching=True) as llm:
        Prompts.answers(llm, [tokens(1, 40)], 40)
        assert not any("one token at a time" in line for line in said)
        llm.beam_search([{"prompt_token_ids": tokens(1, 40)}], BeamSearchParams(beam_width=2, max_tokens=20))
    assert any("one token at a time" in line for line in said)
