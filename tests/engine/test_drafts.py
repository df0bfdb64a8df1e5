"""Speculative decoding over quantized blocks: the tokens without it, wherever drafts are right and wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.engine.drafters import Scripted, drafting
from tests.engine.heads import eagle_head
from tests.engine.support import EXACT, Prompts, rarely

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


@pytest.fixture(scope="module")
def undrafted(engine: Any) -> Callable[[str], list[list[int]]]:
    """What a format answers without drafts."""

    @cache
    def answers(fmt: str) -> list[list[int]]:
        backend, options = FORMATS[fmt]
        with engine(backend, options, block_size=32) as llm:
            return Prompts.answers(llm, questions(), N_TOKENS)

    return answers


@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens_are_those_without_drafts(
    fmt: str, engine: Any, undrafted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, on a pool too small for it, and alone; drafts go wrong everywhere around the end of a block."""
    backend, options = FORMATS[fmt]
    prompts, plain = questions(), undrafted(fmt)
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


@pytest.mark.parametrize("fmt", rarely(FORMATS, "int4", "kivi2", "read sparsely"))
def test_a_drafting_head_among_the_quantized_layers(fmt: str, engine: Any, undrafted: Any, tmp_path: Path) -> None:
    """An EAGLE head, whose layers are quantized like the model's: in chunks, preempted, from cached blocks."""
    (backend, options), plain = FORMATS[fmt], undrafted(fmt)
    head = {"method": "eagle", "model": str(eagle_head(tmp_path)), "num_speculative_tokens": N_DRAFTS}
    more = dict(block_size=32, enable_prefix_caching=True, disable_log_stats=False)
    with engine(backend, options, speculative_config=head, **more, **SMALL) as llm:
        cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
        assert [len(group.layer_names) for group in cache.kv_cache_groups] == [8]  # of one size then, that of codes
        assert Prompts.answers(llm, questions(), N_TOKENS) == plain
        for _ in range(2):
            assert Prompts.answers(llm, questions()[-2:], N_TOKENS) == plain[-2:]
        accepted, drafted, preempted, cached = (
            metric(llm, name)
            for name in (
                "spec_decode_num_accepted_tokens",
                "spec_decode_num_draft_tokens",
                "num_preemptions",
                "prefix_cache_hits",
            )
        )
    assert 0.3 * drafted < accepted < 0.95 * drafted
    assert min(preempted, cached) > 0


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"num_key_value_heads": 4}, {}, r"the drafting head has 4 KV heads of size 64, the model 2 of 64: use a head"),
        ({"ptd_token_id": 5}, {"parallel_drafting": True}, r"makes several at once: leave parallel_drafting out"),
    ],
    ids=["another shape", "several at once"],
)
def test_heads_that_are_refused(
    config: dict[str, Any], more: dict[str, Any], message: str, engine: Any, tmp_path: Path
) -> None:
    file = eagle_head(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    head = {"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": N_DRAFTS, **more}
    with pytest.raises(ValueError, match=rf"(?s)cannot start: .*format='kivi4' .*{message}.*with format 'model'"):
        engine("kivi", {}, speculative_config=head).__enter__()
