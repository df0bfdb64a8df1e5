"""`lossless` on a real model (`make real`): 200 prompts of prose answer as under stock vLLM, token for token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
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
    max_num_seqs=16, max_num_batched_tokens=96, num_gpu_blocks_override=17, block_size=32, enable_prefix_caching=True
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
def engines(engine: Any, model: Path) -> Iterator[tuple[Any, Any]]:
    """Stock vLLM, and one that may draft as many as any case. Both stay: the first to close would end the other."""
    options, common = {**READ, "drafts": MOST_DRAFTS}, dict(model=str(model), max_model_len=256)
    with ExitStack() as stack:
        stock = stack.enter_context(engine("CPU_ATTN", kv_cache_memory_bytes=256 << 20, **common))
        yield stock, stack.enter_context(engine("sparq", options, disable_log_stats=False, **common, **CROWDED))


def counted(llm: Any) -> Counter[str]:
    """What vLLM has counted until now, accepted drafts by position too."""
    vectors = {
        metric.name.removeprefix("vllm:"): metric.values for metric in llm.get_metrics() if hasattr(metric, "values")
    }
    by_position = vectors["spec_decode_num_accepted_tokens_per_pos"]
    return Counter({name: int(n) for name, n in numbers(llm).items()}) + Counter(
        {f"accepted {i}": n for i, n in enumerate(by_position)}
    )


@pytest.mark.parametrize("n_drafts", range(1, MOST_DRAFTS + 1))
def test_200_prompts_answer_as_under_stock_vllm(
    n_drafts: int, engines: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sixth of them with each number of drafts; the last ones again, from cached blocks."""
    monkeypatch.setattr(Pace, "n_drafts", lambda self, n_tokens: n_drafts)
    stock, drafting = engines
    mine = batch[n_drafts - 1 :: MOST_DRAFTS]
    wanted, before = Prompts.answers(stock, mine, N_TOKENS), counted(drafting)
    found = Prompts.answers(drafting, mine, N_TOKENS)
    again = Prompts.answers(drafting, mine[-4:], N_TOKENS)
    ended = counted(drafting) - before
    equal = sum(answer == other for answer, other in zip(found, wanted, strict=True))
    drafted, accepted = (ended[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    by_position = " ".join(f"{ended[f'accepted {i}'] / ended['spec_decode_num_drafts']:.2f}" for i in range(n_drafts))
    print(
        f"{n_drafts} drafts: {equal} of {len(mine)} equal, accepted {accepted} of {drafted}, by position {by_position}"
    )
    print(*(f"{name} {ended[name]}" for name in ("num_preemptions", "prefix_cache_hits")))
    assert equal == len(mine)
    assert again == wanted[-4:]
    assert 0.1 < accepted / drafted < 0.99
    assert ended["prefix_cache_hits"] > 0
