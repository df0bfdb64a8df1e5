"""Speculative decoding: drafts are verified as decodes of their own length, in one captured graph."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda.inside.test_graphs import watched
from tests.engine.support import EXACT

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SMALL: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=64 << 20, block_size=64)


@pytest.mark.parametrize("read", ["sparse", "sparse spans"])
def test_answers_are_those_of_single_tokens(
    read: str, engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [prompts.of_length(n) for n in (40, 129, 300)]
    with engine("sparq", EXACT[read], **SMALL) as llm:
        alone = prompts.answers(llm, some, 40)
    drafting = dict(speculative_config=NGRAM, disable_log_stats=False)
    with engine("sparq", EXACT[read], **SMALL, **drafting) as llm, watched(monkeypatch) as (modes, _):
        assert prompts.answers(llm, some, 40) == alone
        accepted = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}["vllm:spec_decode_num_accepted_tokens"]
    assert accepted > 0
    assert "FULL" in modes
