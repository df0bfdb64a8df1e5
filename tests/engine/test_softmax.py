"""Models whose softmax is not of the tokens alone, or whose layers share caches or chunk them: beside stock vLLM."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import seeded
from tests.architectures.configurations import CHUNKS, CLASSIC, LOGITS, SHARED
from tests.engine.support import EXACT, Prompts, rarely
from tests.engine.test_states import counted

pytestmark = pytest.mark.engine

MODELS = {**LOGITS, **SHARED, **CHUNKS}
NAMES = (
    "gpt-oss",
    pytest.param("gemma-2", marks=pytest.mark.long),
    pytest.param("gemma-3n", marks=pytest.mark.long),
    "gemma-4-e2b",
    "llama-4",
)
"""Soft caps have the tests of the ops beside them, and Gemma 4 shares caches as Gemma 3n does."""
ALL_READ: dict[str, Any] = {"compression": 1, "k": 4096, "dense_below": 0}
LOOKED_UP = {**MODELS, "gemma-3": CLASSIC["gemma-3"]}
N_BLOCKS = {name: 30 if name in (*CHUNKS, "gemma-4") else 44 for name in LOOKED_UP}
"""Of 128 tokens: too few for all of the prompts, more than the longest needs. Layers of chunks need few, and so
does one of full attention among four.
"""


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    given = dict(model=str(folder), skip_tokenizer_init=True, load_format=seeded.LOAD_FORMAT, max_model_len=2048)
    return {**given, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20, **more}


@pytest.fixture(scope="module")
def token_prompts() -> list[list[int]]:
    rng = random.Random(3)
    lengths = (5, 127, 128, 129, 300, 700, 1100, 1500, *[250] * 9)
    return [[rng.randrange(3, 512) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_left_out_it_is_dense(name: str, tmp_path: Path, token_prompts: Any, engine: Any) -> None:
    """In chunks, from cached blocks, and after preemptions."""
    seeded.register()
    folder = MODELS[name].write(tmp_path)
    with engine("CPU_ATTN", {}, **arguments(folder)) as llm:
        dense = Prompts.answers(llm, token_prompts)
    assert len({tuple(answer) for answer in dense}) == len(dense)
    small = dict(max_num_batched_tokens=256, num_gpu_blocks_override=N_BLOCKS[name], enable_prefix_caching=True)
    with engine("sparq", ALL_READ, **arguments(folder, disable_log_stats=False, **small)) as llm:
        assert Prompts.answers(llm, token_prompts) == dense
        assert counted(llm, "num_preemptions") > 0
        for i in (6, 6, 7, 7):
            assert Prompts.answers(llm, token_prompts[i : i + 1]) == dense[i : i + 1]
        assert counted(llm, "prefix_cache_hits") > 1000


@pytest.mark.parametrize("name", rarely(LOOKED_UP, *(set(LOOKED_UP) - {"gpt-oss"})))
def test_spans_are_looked_up_alike(name: str, tmp_path: Path, token_prompts: Any, engine: Any) -> None:
    """InfLLM's read: dense with all spans; with few of them, in a crowd that is preempted as alone."""
    seeded.register()
    folder = LOOKED_UP[name].write(tmp_path)
    with engine("CPU_ATTN", {}, **arguments(folder)) as llm:
        dense = Prompts.answers(llm, token_prompts)
    with engine("sparq", EXACT["full infllm"], **arguments(folder)) as llm:
        assert Prompts.answers(llm, token_prompts) == dense
    with engine("sparq", EXACT["sparse infllm"], **arguments(folder)) as llm:
        alone = Prompts.alone(llm, token_prompts[:9])
    assert sum(a != b for a, b in zip(alone, dense, strict=False)) >= 3
    small = dict(max_num_batched_tokens=256, num_gpu_blocks_override=N_BLOCKS[name])
    with engine("sparq", EXACT["sparse infllm"], **arguments(folder, disable_log_stats=False, **small)) as llm:
        assert Prompts.answers(llm, token_prompts)[:9] == alone
        assert counted(llm, "num_preemptions") > 0
