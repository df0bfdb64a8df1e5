"""Reads of spans (Quest) in real engines: three spans of 16 tokens, and the same answers however a request is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import CROWD, EXACT, NGRAM, Prompts, random_prompts, rarely
from tests.engine.test_processes import run_in_one_process
from tests.engine.test_sameness import RUNS

pytestmark = pytest.mark.engine

SPARSE = EXACT["sparse spans"]
UNIFORM = {**SPARSE, "dense_layers": 0}
"""The same for the preset, which would read its first layers densely."""


@pytest.fixture(scope="module")
def alone(prompts: Prompts, engine: Any) -> list[list[int]]:
    """What each prompt of `prompts.mixed` answers when it is alone in the engine: the yardstick."""
    with engine("sparq", SPARSE) as llm:
        return prompts.alone(llm, prompts.mixed)


def test_the_yardstick_is_sparse(engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    """Dense answers differ from it where there is something to leave out, and there alone."""
    with engine("CPU_ATTN") as llm:
        dense = prompts.answers(llm, prompts.mixed)
    assert dense[:2] == alone[:2]
    assert sum(a != b for a, b in zip(dense, alone, strict=True)) >= 3


@pytest.mark.parametrize("run", rarely(["chunks of 64", "prefix caching", "compiled"], "compiled"))
def test_same_answers(run: str, engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    with engine("sparq", SPARSE, **RUNS[run]) as llm:
        assert prompts.answers(llm, prompts.mixed) == alone
        if run == "prefix caching":
            assert prompts.answers(llm, prompts.mixed) == alone, "from cached blocks"


def test_block_sizes_do_not_matter(engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    """Spans are the same tokens in any blocks, and their bounds are exact."""
    with engine("sparq", SPARSE, **RUNS["blocks of 32"]) as llm:
        assert prompts.answers(llm, prompts.mixed) == alone


def test_equal_beginnings_in_one_step(engine: Any, prompts: Prompts) -> None:
    """Requests that come together share the blocks they begin with before any of those is computed."""
    long, other = prompts.of_length(900), prompts.of_length(200)
    family = [long, long, long[:600] + other, long[:700], long[:130] + other]
    with engine("sparq", SPARSE, enable_prefix_caching=True) as llm:
        together = prompts.answers(llm, family)
        for prompt, answer in zip(family, together, strict=True):
            assert llm.reset_prefix_cache()
            assert prompts.answers(llm, [prompt]) == [answer]


def test_preemption(engine: Any) -> None:
    """Requests thrown out in the middle of an answer come back: their output tokens are computed again, by spans."""
    batch = random_prompts(*CROWD)
    pool = dict(num_gpu_blocks_override=20, max_model_len=640, max_num_batched_tokens=640)
    with engine("sparq", SPARSE, **pool, disable_log_stats=False) as llm:
        answers = Prompts.answers(llm, batch, n_tokens=380)
        metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        assert metrics["vllm:num_preemptions"] > 0
    with engine("sparq", SPARSE, **{**pool, "num_gpu_blocks_override": None}) as llm:
        assert Prompts.answers(llm, batch, n_tokens=380) == answers


@pytest.mark.long
def test_speculative_decoding(tmp_path: Path, prompts: Prompts, alone: list[list[int]]) -> None:
    """Draft tokens are verified with the reads that decoding them one by one would have made."""
    quest = dict(attention_backend="quest", additional_config={"sparq": UNIFORM})
    result = run_in_one_process(tmp_path, prompts.mixed, speculative_config=NGRAM, **quest)
    assert result["tokens"] == alone
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert_quest(result["reports"], 1)


@pytest.mark.long
def test_tensor_parallel(engine: Any, prompts: Prompts, alone: list[list[int]]) -> None:
    with engine("quest", UNIFORM, tensor_parallel_size=2) as llm:
        assert prompts.answers(llm, prompts.mixed) == alone
        assert_quest(llm.collective_rpc("attention_report"), 2)


def assert_quest(reports: list[dict[str, Any]], n_workers: int) -> None:
    assert len(reports) == n_workers
    for report in reports:
        assert {layer["backend"] for layer in report.values()} == {"QUEST"}
        assert all("quest_decode" in layer["ops"] for layer in report.values())
