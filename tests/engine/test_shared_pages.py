"""Models of windows or chunks beside full attention, whose layers share pages: they answer as if they did not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.architectures import seeded
from tests.architectures.configurations import CHUNKS
from tests.engine.small_models import gemma3
from tests.engine.support import Prompts
from vllm_sparq.attention_backends import worker

pytestmark = pytest.mark.engine

LENGTHS = (1, 60, 96, 97, 130, 200, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma3(tmp_path_factory.mktemp("mixed"), seed=5, full=[False, True] * 2)


@pytest.fixture(scope="module")
def requests() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 512) for _ in range(n)] for n in LENGTHS]


def specs_of(llm: Any) -> list[Any]:
    """Of the cache groups, as the scheduler has them."""
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    return [group.kv_cache_spec for group in groups]


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seeded.register()
    return CHUNKS["llama-4"].write(tmp_path_factory.mktemp("chunked"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("flexgen", {}),
    "sparq over int4": ("sparq", {"format": "int4", "k": 16, "r": 8, "local": 4, "dense_below": 0}),
    "h2o over int4": ("h2o", {"format": "int4", "budget": 256}),
    "kivi2": ("kivi", {"format": "kivi2"}),
    "int4 beside chunks": ("flexgen", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_answers(
    name: str, model: Path, chunked: Path, requests: list[list[int]], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All together, the pool too small for it, and with blocks of one length for all (of chunks: on a large pool)."""
    backend, options = CASES[name]
    small: dict[str, Any] = dict(
        model=str(model), skip_tokenizer_init=True, max_model_len=512, max_num_batched_tokens=256
    )
    if "chunks" in name:
        small |= dict(model=str(chunked), load_format=seeded.LOAD_FORMAT)
    caching = dict(enable_prefix_caching=True) if backend != "h2o" else {}
    with engine(backend, options, kv_cache_memory_bytes=3 << 20, **small, **caching) as llm:
        first = [Prompts.answers(llm, requests) for _ in range(2)]
        specs = specs_of(llm)
        (full_size,) = {spec.block_size for spec in specs if spec.dtype == torch.uint8}
        (window_size,) = {spec.block_size for spec in specs if spec.dtype != torch.uint8}
        assert len({spec.page_size_bytes for spec in specs}) == 1
        assert window_size < full_size
    assert first[0] == first[1]
    assert len({tuple(answer) for answer in first[0]}) > 1
    if "chunks" not in name:  # which cannot be cut into blocks of any length
        monkeypatch.setattr(worker, "share_pages", lambda specs, *_: specs)
    with engine(backend, options, kv_cache_memory_bytes=64 << 20, block_size=full_size, **small) as llm:
        assert full_size in {spec.block_size for spec in specs_of(llm)}
        assert Prompts.answers(llm, requests) == first[0]
