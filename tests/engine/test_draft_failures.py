"""What goes wrong with drafts costs their speed alone: requests go on, and what they answer is dense attention's."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest

from tests.engine.support import Prompts
from tests.engine.test_lossless import BAD
from vllm_sparq.attention_backends.drafting import SelfDrafter
from vllm_sparq.attention_backends.pace import Pace

pytestmark = pytest.mark.engine

N_TOKENS = 40
SMALL: dict[str, Any] = dict(block_size=32, max_model_len=256, max_num_batched_tokens=256)
POOL = 9
"""Blocks of a pool that holds one request of the model's length, and vLLM's null block."""


@pytest.fixture(autouse=True)
def _drafting_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "n_drafts", lambda self, n_tokens: self.most)


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    """Random, so that answers change with all that is read."""
    rng = random.Random(9)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in (216, 90, 121, 160, 60)]


@pytest.fixture(scope="module")
def dense(engine: Any, batch: list[list[int]]) -> list[list[int]]:
    with engine("CPU_ATTN", **SMALL) as llm:
        return Prompts.answers(llm, batch, N_TOKENS)


def test_a_step_that_drafts_and_fails(
    engine: Any, batch: Any, dense: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of its drafts: the log says so once, and the requests go on without."""
    drafted, calls = SelfDrafter._next, []

    def fails_later(self: Any, *args: Any) -> Any:
        calls.append(len(args[0]))
        if len(calls) == 8:
            raise RuntimeError("out of memory")
        return drafted(self, *args)

    monkeypatch.setattr(SelfDrafter, "_next", fails_later)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with engine("sparq", BAD, **SMALL) as llm:
        assert Prompts.answers(llm, batch, N_TOKENS) == dense
        assert len(calls) == 8
        assert Prompts.answers(llm, batch, N_TOKENS) == dense
    assert len(calls) == 8
    assert "goes on without drafts" in caplog.text
    assert "RuntimeError: out of memory" in caplog.text


def test_a_pool_without_room_for_drafts(engine: Any, batch: Any, dense: Any) -> None:
    """Of one request as long as the model allows, and of others that wait for its blocks."""
    with engine("sparq", BAD, **SMALL, num_gpu_blocks_override=POOL) as llm:
        assert Prompts.answers(llm, batch[:1], N_TOKENS) == dense[:1]
        assert Prompts.answers(llm, batch, N_TOKENS) == dense


def test_an_abort_between_draft_and_verification(engine: Any, batch: Any, dense: Any) -> None:
    """Its blocks go to others, in which nothing of it is read."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=N_TOKENS, ignore_eos=True, detokenize=False)
    found: dict[str, list[int]] = {}
    with engine("sparq", BAD, **SMALL, num_gpu_blocks_override=20) as llm:
        engine_ = llm.llm_engine
        requests = engine_.engine_core.engine_core.scheduler.requests
        for i in (1, 4):
            engine_.add_request(f"{i}", {"prompt_token_ids": batch[i]}, params)
        while not all(request.spec_token_ids for request in requests.values()):
            engine_.step()
        assert len(requests) == 2
        engine_.abort_request(["1"])
        for i in (2, 3):
            engine_.add_request(f"{i}", {"prompt_token_ids": batch[i]}, params)
        while engine_.has_unfinished_requests():
            found |= {out.request_id: list(out.outputs[0].token_ids) for out in engine_.step() if out.finished}
        assert not requests
        pool = engine_.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == 19
    assert found == {f"{i}": dense[i] for i in (2, 3, 4)}
