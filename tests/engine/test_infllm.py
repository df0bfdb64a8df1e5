"""InfLLM's read in real engines: what is looked up matters, and a request answers the same however it is run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.support import EXACT, MODEL, Prompts, assert_preemption_does_not_matter, rarely
from tests.engine.test_sameness import RUNS

pytestmark = pytest.mark.engine

SPARSE = EXACT["sparse infllm"]


@pytest.fixture(scope="module")
def alone(prompts: Prompts, engine: Any) -> list[list[int]]:
    """What each prompt of `prompts.mixed` answers when it is alone in the engine: the yardstick."""
    with engine("sparq", SPARSE) as llm:
        return prompts.alone(llm, prompts.mixed)


def test_what_is_looked_up_matters(engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    """Answers differ from those of the same tokens in the window, and from dense ones, where there is so much."""
    with engine("CPU_ATTN") as llm:
        dense = prompts.answers(llm, prompts.mixed)
    with engine("sparq", {**SPARSE, "local": 176}) as llm:
        window = prompts.answers(llm, prompts.mixed)
    assert dense[:4] == window[:4] == alone[:4]  # everything is read
    for other in (dense, window):
        assert sum(a != b for a, b in zip(other, alone, strict=True)) >= 2


@pytest.mark.parametrize("run", rarely(["in one batch", "chunks of 64", "blocks of 32", "compiled"], "compiled"))
def test_same_answers(run: str, engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    """Spans and their windows are the same tokens in any steps and blocks."""
    with engine("sparq", SPARSE, **RUNS[run]) as llm:
        assert prompts.answers(llm, prompts.mixed) == alone


def test_preemption(engine: Any) -> None:
    """Requests thrown out in the middle of an answer come back: all their queries are added up anew."""
    assert_preemption_does_not_matter(engine, "sparq", SPARSE)


def test_aborts(engine: Any) -> None:
    """Sums of queries stay behind in the blocks of who has left, of a prompt and of an answer: nobody reads them."""
    from vllm import SamplingParams

    rng = random.Random(2)
    batch = [[rng.randrange(3, 1000) for _ in range(n)] for n in (420, 380, 300, 410, 450, 260)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    found: dict[str, list[int]] = {}
    small = dict(num_gpu_blocks_override=16, max_model_len=512, max_num_batched_tokens=256)
    with engine("sparq", SPARSE, poison=False, **small) as llm:  # the numbers of others, and no NaN in their place
        alone = Prompts.alone(llm, batch)
        core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        n_free = pool.get_num_free_blocks()
        for i, prompt in enumerate(batch):
            core.add_request(f"{i}", {"prompt_token_ids": prompt}, params)
        core.step()
        first, second = list(scheduler.requests.values())[:2]
        assert 0 < first.num_computed_tokens < len(batch[0])
        core.abort_request(["0"])
        while second.num_output_tokens < 4:
            core.step()
        core.abort_request(["1"])
        while core.has_unfinished_requests():
            found |= {out.request_id: list(out.outputs[0].token_ids) for out in core.step() if out.finished}
        assert pool.get_num_free_blocks() == n_free
    assert found == {f"{i}": alone[i] for i in (2, 3, 4, 5)}


@pytest.mark.long
def test_tensor_parallel(engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    """Representatives are a KV head's own, so each worker chooses those of its heads."""
    with engine("infllm", SPARSE, tensor_parallel_size=2) as llm:
        assert prompts.answers(llm, prompts.mixed) == alone
        reports = llm.collective_rpc("attention_report")
    assert [{layer["backend"] for layer in report.values()} for report in reports] == [{"INFLLM"}] * 2


def test_no_block_is_shared() -> None:
    from vllm.engine.arg_utils import EngineArgs

    asked = dict(attention_backend="infllm", enable_prefix_caching=True, skip_tokenizer_init=True)
    assert not EngineArgs(model=str(MODEL), **asked).create_engine_config().cache_config.enable_prefix_caching
