"""Resumable sessions: a session answers what the same conversation in one prompt gets, whoever else is there."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.drafters import drafting
from tests.engine.sessions import Sessions
from tests.engine.support import EXACT, Prompts, rarely

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "h2o": ("h2o", {"budget": 256}),
    "streaming, bounded, int8": ("streaming", {"budget": 256, "prefill": "bounded", "format": "int8"}),
    "sparq": ("sparq", EXACT["sparse"]),
    "infllm": ("sparq", EXACT["sparse infllm"]),
    "quest over int4": ("sparq", {**EXACT["sparse spans"], "format": "int4"}),
    "kivi": ("kivi", {}),
}
N_TOKENS = 30
DENSE_READS = ("kivi",)


def conversation(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in lengths]


FIRST, SECOND = conversation(1, 600, 300), conversation(2, 620, 280)


def in_one_prompt(turns: list[list[int]], said: list[list[int]]) -> list[int]:
    """A conversation as its last turn finds it: of each answer vLLM drops the last token, which was never computed."""
    prompt = list(turns[0])
    for turn, answer in zip(turns[1:], said, strict=False):
        prompt += [*answer[:-1], *turn]
    return prompt


@pytest.mark.parametrize("method", rarely(METHODS, "kivi", "quest over int4", "infllm"))
def test_sessions(method: str, engine: Any) -> None:
    """Alone, beside another, beside another in a pool that preempts, and in one prompt: one answer."""
    backend, options = METHODS[method]
    with engine(backend, options, async_scheduling=False, max_num_batched_tokens=640) as llm:
        sessions = Sessions(llm)
        alone = {**sessions.talk({"a": FIRST}), **sessions.talk({"b": SECOND})}
        assert [len(answer) for answer in alone["a"]] == [N_TOKENS, N_TOKENS]
        assert sessions.talk({"a": FIRST, "b": SECOND}) == alone
        assert sessions.talk_ahead({"a": FIRST, "b": SECOND}) == alone
        for name, turns in (("a", FIRST), ("b", SECOND)):
            whole = in_one_prompt(turns, alone[name])
            assert Prompts.answers(llm, [whole], N_TOKENS) == [alone[name][1]]
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_usage() == 0
    if method in DENSE_READS:
        return
    with engine(backend, options, enable_prefix_caching=True) as llm:
        sessions = Sessions(llm)
        assert sessions.talk({"a": FIRST, "b": SECOND}) == alone
        assert sessions.talk({"a": FIRST, "b": SECOND}) == alone  # from cached blocks, where there are any


@pytest.mark.parametrize("method", ["h2o", "sparq"])
def test_a_preempted_session_goes_on_as_it_did(method: str, engine: Any) -> None:
    """It comes back as one prompt, which is what it was computed as."""
    backend, options = METHODS[method]
    options = {**options, "budget": 288} if method == "h2o" else options
    turns = {name: conversation(i, 200, 120) for i, name in enumerate("abcd")}
    pool = dict(num_gpu_blocks_override=30, block_size=32, max_model_len=640, max_num_batched_tokens=640)
    with engine(backend, options, async_scheduling=False, **pool) as llm:
        sessions = Sessions(llm)
        alone: dict[str, list[list[int]]] = {}
        for name in turns:
            alone |= sessions.talk({name: turns[name]}, n_tokens=60)
        preempt, n_preempted = sessions.core.scheduler._preempt_request, [0]

        def counted(*args: Any, **kwargs: Any) -> None:
            n_preempted[0] += 1
            preempt(*args, **kwargs)

        sessions.core.scheduler._preempt_request = counted
        assert sessions.talk(turns, n_tokens=60) == alone
    assert n_preempted[0] > 0


def test_a_turn_without_tokens(engine: Any) -> None:
    """Nothing new to read: the session is asked for more of its answer."""
    with engine("h2o", {"budget": 256}, async_scheduling=False) as llm:
        said = Sessions(llm).talk({"a": [FIRST[0], []]})["a"]
        assert Prompts.answers(llm, [in_one_prompt([FIRST[0], []], said)], N_TOKENS) == [said[1]]


def test_a_turn_of_one_token_before_the_end_of_a_block(engine: Any) -> None:
    """vLLM fills such a turn up with drafts that nobody has made: none of them may become a code."""
    drafts = dict(speculative_config=drafting("Echo", 5), disable_log_stats=False)
    with engine("flexgen", {}, async_scheduling=False, block_size=32, **drafts) as llm:
        sessions = Sessions(llm)
        for n in range(16, 28):  # the next turn's token comes at slot n + 7
            turns = [*conversation(n, n), [7]]
            (said,) = sessions.talk({f"s{n}": turns}, n_tokens=8).values()
            assert Prompts.answers(llm, [in_one_prompt(turns, said)], 8) == [said[1]], n


def test_a_scheduler_that_does_not_know_is_stopped(engine: Any) -> None:
    """Whatever grows a prompt in place under eviction ends in an error, never in another request's blocks."""
    from vllm.v1.core.sched.scheduler import Scheduler

    with engine("h2o", {"budget": 256}, async_scheduling=False) as llm:
        sessions = Sessions(llm)
        scheduler = sessions.core.scheduler
        scheduler._update_request_as_session = lambda *args: Scheduler._update_request_as_session(scheduler, *args)
        with pytest.raises(RuntimeError, match=r"a prompt grew from 600 to 929 tokens .* leave --scheduler-cls out"):
            sessions.talk({"a": FIRST})
