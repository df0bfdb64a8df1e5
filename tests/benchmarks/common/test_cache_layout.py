"""How a cache is cut is part of a case: two block sizes are two cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_sparq.benchmarks.common.cache_layout import CacheLayout
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.engine.cases import LLAMA_1B, Case, Model, engines
from vllm_sparq.benchmarks.engine.cases import key_of as engine_key
from vllm_sparq.benchmarks.engine.pressure import key_of as pressure_key
from vllm_sparq.benchmarks.engine.requests import Requests
from vllm_sparq.benchmarks.engine.requests import key_of as requests_key
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import UsageError

SHAPE = ModelShape.of_config({**LLAMA_1B, "num_hidden_layers": 4})
SPARQ, DENSE = Method.named("sparq"), Method.named("dense")


def test_a_layout_by_hand() -> None:
    """Llama-3.2-1B has 8 KV heads of 64; a token is 4 * 64 bytes in each of 4 layers."""
    dense = CacheLayout.of(DENSE, SHAPE, max_model_len=65536)
    assert dense == CacheLayout(block_size=None, kv_bytes_per_token=4 * 8 * 256)
    for max_model_len, tokens in ((4096, 128), (65536, 256)):
        sparq = CacheLayout.of(SPARQ, SHAPE, max_model_len=max_model_len)
        assert sparq.block_size == tokens
        # int4 codes of 64 channels, and 4 bytes of scale per channel of a block; a page is a whole number of lines
        assert sparq.kv_bytes_per_token == pytest.approx(4 * 8 * (256 + 32 + 64 * 4 / tokens), rel=0.002)
    assert CacheLayout.of(SPARQ, SHAPE, max_model_len=65536, block_size=64).block_size == 64


def test_two_block_sizes_are_two_cases() -> None:
    case, model = Case(context=8192, batch=4), Model.of(None, 4)
    keys = {
        engine_key(case, engine, model, max_context)
        for size in (None, 64, 256)
        for max_context in (8192, 65536)
        for engine in engines([], [{"r": 16}], size)[2:]
    }
    assert len(keys) == 4  # 128 or 256 as contexts have it, 64, and 256 whatever they are
    asked = [Requests(input_len=100, output_len=10, num_prompts=4, block_size=size) for size in (None, 64, 256)]
    assert len({requests_key(one, SPARQ, model) for one in asked}) == 3
    traces = [{"n": 1, "engine_args": more} for more in ({}, {"block_size": 64}, {"block_size": 256})]
    assert len({pressure_key(one, SPARQ, SHAPE, 4096) for one in traces}) == 3
    assert pressure_key(traces[0], SPARQ, SHAPE, 4096) != pressure_key(traces[0], SPARQ, SHAPE, 65536)


def test_a_shape_is_read_from_the_folder(tmp_path: Path) -> None:
    shape = ModelShape.of(WEIGHTS)
    assert (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_size) == (4, 8, 2, 64)
    assert (shape.max_model_len, shape.vocab_size) == (4096, 1024)
    assert ModelShape.of(WEIGHTS, "float32").dtype == torch.float32
    with pytest.raises(UsageError, match="--dtype 'nope' is not usable: give bfloat16, float16, float32 or auto"):
        ModelShape.of(WEIGHTS, "nope")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"model_type": "llama", "num_hidden_layers": "x"}', "é"]
)
def test_a_broken_config_is_said_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    told = r"its config.json (is not a JSON object|does not describe a model of attention layers) \(.*\): give the"
    with pytest.raises(UsageError, match=told):
        ModelShape.of(tmp_path)
