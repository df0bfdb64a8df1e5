"""Attention beside layers with a state, where vLLM's blocks hold several of our pages."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import seeded
from tests.architectures.configurations import STATES, Model
from tests.engine.support import Prompts, rarely
from vllm_sparq.scheduler.spec import is_ours

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "all read": ("sparq", {"compression": 1, "k": 4096, "dense_below": 0}),
    "sparq": ("sparq", {"compression": 8, "min_k": 16, "dense_below": 0}),
    "quest": ("quest", {"k": 64, "dense_below": 0, "dense_layers": 0}),
    "infllm": ("infllm", {"k": 224, "local": 128, "dense_below": 0}),
    "flexgen": ("flexgen", {}),
    "kivi2": ("kivi", {"format": "kivi2"}),
    "h2o": ("h2o", {"budget": 256}),
    "h2o over int4": ("h2o", {"budget": 384, "format": "int4", "prefill": "bounded"}),
}
DENSE = "CPU_ATTN", {}


def altered(name: str, **changes: Any) -> Model:
    one = STATES[name]
    return Model(one.architecture, {**one.config, **changes}, one.dtype)


MAMBA = altered("falcon-h1", mamba_d_state=96, num_hidden_layers=2)
"""A state of 201 KiB: a block of 256 tokens in vLLM's own pages."""
CONV = altered("lfm2", conv_L_cache=150, layer_types=["conv", "full_attention"], num_hidden_layers=2)
"""The one with which stock vLLM caches prefixes on CPU, with a state of the same size as 150 tokens."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    seeded.register()
    return {name: one.write(tmp_path_factory.mktemp(name)) for name, one in (("mamba", MAMBA), ("conv", CONV))}


@pytest.fixture(scope="module")
def token_prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 512) for _ in range(n)] for n in (5, 127, 128, 129, 300, 512, 700, 900, 1100, 1500)]


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    given = dict(model=str(folder), skip_tokenizer_init=True, load_format=seeded.LOAD_FORMAT, max_model_len=2048)
    return {**given, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20, **more}


def too_small(llm: Any) -> dict[str, Any]:
    """Arguments of an engine like this one, with a pool for little more than one of the longest requests."""
    cache = llm.llm_engine.vllm_config.cache_config
    n_blocks = math.ceil(1.2 * cache.num_gpu_blocks / cache.kv_cache_max_concurrency) + 3
    return dict(num_gpu_blocks_override=n_blocks, disable_log_stats=False)


def counted(llm: Any, name: str) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def pages_per_block(llm: Any) -> int:
    """In the layers of ours."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    sizes = [group.kv_cache_spec.block_size for group in runner.kv_cache_config.kv_cache_groups]
    (ratio,) = {size // page for size, page in zip(sizes, runner._kernel_block_sizes, strict=True) if size != page}
    return int(ratio)


def growing(llm: Any) -> list[list[int]]:
    """Prompts whose answers need another block, staged tokens included."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    (spec,) = [group.kv_cache_spec for group in runner.kv_cache_config.kv_cache_groups if is_ours(group.kv_cache_spec)]
    n_blocks = getattr(spec, "n_blocks", lambda n_tokens: -(-n_tokens // spec.block_size))
    length = next(n for n in range(200, 2000) if n_blocks(n + 12) > n_blocks(n))
    rng = random.Random(5)
    return [[rng.randrange(3, 512) for _ in range(length)] for _ in range(6)]


def test_with_nothing_left_out_it_is_dense(folders: dict[str, Path], token_prompts: Any, engine: Any) -> None:
    """Prompts of 5 to 1,500 tokens, in chunks."""
    with engine(*DENSE, **arguments(folders["mamba"])) as llm:
        dense = Prompts.answers(llm, token_prompts)
    assert len({tuple(answer) for answer in dense}) == len(dense)
    for method in (
        METHODS["all read"],
        ("h2o", {"budget": 2048}),
        ("quest", {"k": 4096, "dense_below": 0, "dense_layers": 0}),
        ("infllm", {"k": 4096, "dense_below": 0}),
    ):
        with engine(*method, **arguments(folders["mamba"])) as llm:
            assert Prompts.answers(llm, token_prompts) == dense


@pytest.mark.parametrize("name", rarely(METHODS, "all read", "quest", "flexgen", "h2o"))
def test_same_answers(name: str, folders: dict[str, Path], token_prompts: Any, engine: Any) -> None:
    """Together, in other chunks, and on a pool that is too small for all of them, as alone."""
    with engine(*METHODS[name], **arguments(folders["mamba"])) as llm:
        alone = Prompts.alone(llm, token_prompts)
        assert pages_per_block(llm) > 1
        more, small = growing(llm), too_small(llm)
        alone += Prompts.alone(llm, more)
    with engine(*METHODS[name], **arguments(folders["mamba"], max_num_batched_tokens=256, **small)) as llm:
        assert Prompts.answers(llm, [*token_prompts, *more]) == alone
        assert counted(llm, "num_preemptions") > 0 or name.startswith("h2o")  # which grow no further


@pytest.mark.parametrize("name", ["dense", "sparq", "flexgen", "kivi2"])
def test_prefix_cache_is_hit(name: str, folders: dict[str, Path], token_prompts: Any, engine: Any) -> None:
    method = {**METHODS, "dense": DENSE}[name]
    more = dict(enable_prefix_caching=True, disable_log_stats=False)
    with engine(*method, **arguments(folders["conv"], **more)) as llm:
        cold, warm = (Prompts.answers(llm, token_prompts) for _ in range(2))
        assert warm == cold
        assert counted(llm, "prefix_cache_hits") > 1000
    with engine(*method, **arguments(folders["conv"])) as llm:
        assert Prompts.answers(llm, token_prompts) == cold
