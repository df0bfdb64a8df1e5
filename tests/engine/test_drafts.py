"""Speculative decoding over quantized blocks: the tokens without it, wherever drafts are right and wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.drafters import Scripted, drafting
from tests.engine.support import EXACT, Prompts

pytestmark = pytest.mark.engine

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("flexgen", {}),
    "kivi4": ("kivi", {}),
    "kivi2": ("kivi", {"format": "kivi2"}),
    "read sparsely": ("sparq", {**EXACT["sparse"], "format": "int4"}),
}
N_DRAFTS, N_TOKENS = 5, 100
SMALL = dict(num_gpu_blocks_override=26, max_model_len=320, max_num_batched_tokens=64, max_num_seqs=8)
"""A pool for half of the requests, and chunks that end anywhere."""


def questions() -> list[list[int]]:
    """Random, so that answers change with all that is read; of lengths all around a block of 32."""
    rng = random.Random(5)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in (30, 31, 32, 33, 61, 63, 64, 97, 120, 150, 159, 160)]


def metric(llm: Any, name: str) -> float:
    return float(next(found.value for found in llm.get_metrics() if found.name == f"vllm:{name}"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens_are_those_without_drafts(fmt: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, on a pool too small for it, and alone; drafts go wrong everywhere around the end of a block."""
    backend, options = FORMATS[fmt]
    prompts = questions()
    with engine(backend, options, block_size=32) as llm:
        plain = Prompts.answers(llm, prompts, N_TOKENS)
    monkeypatch.setattr(Scripted, "known", [[*prompt, *plain[i]] for i, prompt in enumerate(prompts)])
    monkeypatch.setattr(Scripted, "n_right", [])
    with engine(
        backend,
        options,
        block_size=32,
        speculative_config=drafting("Scripted", N_DRAFTS),
        disable_log_stats=False,
        **SMALL,
    ) as llm:
        together = Prompts.answers(llm, prompts, N_TOKENS)
        alone = Prompts.answers(llm, prompts[:1], N_TOKENS)
        accepted, drafted, preempted = (
            metric(llm, name)
            for name in ("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens", "num_preemptions")
        )
    assert together == plain
    assert alone == plain[:1]
    assert 300 < accepted < drafted - 300
    assert preempted > 0
    assert {*Scripted.n_right} == {*range(N_DRAFTS + 1)}
