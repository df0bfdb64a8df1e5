"""`lossless` on a real model (`make real`): 200 prompts of prose answer as under stock vLLM, token for token."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from tests.engine.support import Prompts
from tests.engine.test_lossless import numbers
from tests.models.test_real import model_here
from vllm_sparq.attention_backends.pace import Pace

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

N_PROMPTS, N_TOKENS, MOST_DRAFTS = 200, 20, 6
READ = {"r": 8, "k": 24, "local": 8, "dense_below": 0, "lossless": True}
"""So little of 40 tokens and more that a part of the drafts is wrong."""

CROWDED: dict[str, Any] = dict(
    max_num_seqs=16, max_num_batched_tokens=96, num_gpu_blocks_override=24, block_size=32, enable_prefix_caching=True
)
"""Batches, prompts in chunks, some preemptions, and prompts of which a part is cached."""


@pytest.fixture(scope="module")
def model() -> Path:
    return model_here("smollm2-135m")


@pytest.fixture(scope="module")
def batch(model: Path) -> list[list[int]]:
    """Windows of 40 to 80 tokens from Python's reference manual, which comes with every Python."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n".join(topics.values()), add_special_tokens=False, verbose=False).input_ids
    rng = random.Random(11)
    lengths = [rng.randrange(40, 81) for _ in range(N_PROMPTS)]
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def stock(engine: Any, model: Path, batch: list[list[int]]) -> list[list[int]]:
    with engine("CPU_ATTN", model=str(model), max_model_len=256, kv_cache_memory_bytes=1 << 30) as llm:
        return Prompts.answers(llm, batch, N_TOKENS)


@pytest.mark.parametrize("n_drafts", range(1, MOST_DRAFTS + 1))
def test_200_prompts_answer_as_under_stock_vllm(
    n_drafts: int, engine: Any, model: Path, batch: Any, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by an engine of one to six drafts; the last ones again, from cached blocks."""
    monkeypatch.setattr(Pace, "n_drafts", lambda self, n_tokens: self.most)
    mine = range(n_drafts - 1, N_PROMPTS, MOST_DRAFTS)
    options = {**READ, "drafts": n_drafts}
    with engine("sparq", options, model=str(model), max_model_len=256, disable_log_stats=False, **CROWDED) as llm:
        found = Prompts.answers(llm, [batch[i] for i in mine], N_TOKENS)
        again = Prompts.answers(llm, [batch[i] for i in mine[-4:]], N_TOKENS)
        ended = numbers(llm)
    drafted, accepted = ended["spec_decode_num_draft_tokens"], ended["spec_decode_num_accepted_tokens"]
    names = ("num_preemptions", "prefix_cache_hits")
    equal = [answer == stock[i] for i, answer in zip(mine, found, strict=True)]
    print(
        f"{n_drafts} drafts: {sum(equal)} of {len(mine)} equal, {accepted / drafted:.0%} of drafts accepted", end=", "
    )
    print(*(f"{name} {ended[name]:.0f}" for name in names))
    assert all(equal)
    assert again == found[-4:]
    assert 0.1 < accepted / drafted < 0.99
    assert ended["prefix_cache_hits"] > 0
