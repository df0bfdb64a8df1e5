"""What one layer, or a model that drafts for itself, is refused for: the value, the rule and the remedy of each."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparq.attention_backends import impl
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.refusals import HEAD_SIZES, layer_refusals
from vllm_sparq.attention_backends.speculation import lossless_refusals
from vllm_sparq.backends import BACKENDS
from vllm_sparq.config import parse_options
from vllm_sparq.platform import SparqCpuPlatform

DENSE = r"use vLLM's own backend \(leave --attention-backend out\)"
LAYER = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=128)

LAYERS: dict[str, tuple[Any, str]] = {
    "head_size": (40, rf"head size 40 is not one of \[32, 48, .*512\]: {DENSE}"),
    "dtype": (torch.float64, r"dtype torch\.float64 is not bfloat16, float16 or float32: set --dtype"),
    "attn_type": ("encoder_only", f"encoder_only attention is not supported, only decoders: {DENSE}"),
    "use_mla": (True, rf"multi-head latent attention is not supported: {DENSE}"),
    "use_sparse": (True, f"the model's own sparse attention is not supported: {DENSE}"),
    "use_mm_prefix": (True, f"bidirectional prefixes are not supported: {DENSE}"),
    "use_per_head_quant_scales": (True, f"scales of K and V per head are not supported: {DENSE}"),
    "use_non_causal": (True, f"non-causal attention is not supported: {DENSE}"),
    "use_rswa": (True, f"reference sliding windows are not supported: {DENSE}"),
    "use_batch_invariant": (True, rf"batch-invariant kernels \(VLLM_BATCH_INVARIANT\) are not supported: {DENSE}"),
    "use_adaptive_verification": (True, f"adaptive verification of drafts is not supported: {DENSE}"),
    "use_kv_connector": (
        True,
        "a KV connector copies dense K and V.*: start without --kv-transfer-config and --kv-offloading-size",
    ),
}
"""Field of vLLM's description of a layer -> a value that cannot be served, and what the user reads."""

ELSEWHERE = {
    "has_sink": "served",
    "has_sliding_window": "served by vLLM's own backend",
    "block_size": "of the engine",
    "kv_cache_dtype": "of the engine",
    "use_dcp": "of the engine",
    "use_pcp": "of the engine",
}
"""Fields for which no layer is refused -> why."""

CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(
        is_moe=False, uses_mrope=False, is_hybrid=False, hf_text_config=SimpleNamespace(layer_types=["full_attention"])
    ),
    parallel_config=SimpleNamespace(data_parallel_size=1, pipeline_parallel_size=1),
    speculative_config=None,
    lora_config=None,
)
LOSSLESS: dict[str, tuple[dict[str, Any], str, Any, str]] = {
    "adapters": ({}, "lora_config", SimpleNamespace(), "does not know LoRA adapters: leave --enable-lora out"),
    "M-RoPE": ({}, "model_config.uses_mrope", True, r"does not know positions of .*\(M-RoPE\): leave lossless out"),
    "states": ({}, "model_config.is_hybrid", True, "does not know layers with a state: leave lossless out"),
    "layers of two kinds": (
        {},
        "model_config.hf_text_config.layer_types",
        ["sliding_attention", "full_attention"],
        "needs layers of one kind, and this model's are full_attention, sliding_attention: leave lossless out",
    ),
    "eviction": (
        {"retention": "heavy_hitter", "budget": 512},
        "",
        None,
        "takes drafts back, .*got format='model' and retention='heavy_hitter': use format 'model' and retention 'all'",
    ),
    "codes": (
        {"format": "int4"},
        "",
        None,
        "takes drafts back, .*got format='int4' and retention='all': use format 'model' and retention 'all'",
    ),
    "stages": (
        {},
        "parallel_config.pipeline_parallel_size",
        2,
        "runs whole models alone so far: leave --pipeline-parallel-size out",
    ),
}
"""What `lossless` does not go with -> options, what is changed of `CONFIG`, and what the user reads."""


@pytest.mark.parametrize("field", LAYERS)
def test_a_layer_is_refused(field: str) -> None:
    value, message = LAYERS[field]
    assert not layer_refusals(LAYER)
    (reason,) = layer_refusals(LAYER._replace(**{field: value}))
    assert re.fullmatch(message, reason), reason


def test_all_reasons_are_said_at_once() -> None:
    assert len(layer_refusals(LAYER._replace(**{field: value for field, (value, _) in LAYERS.items()}))) == len(LAYERS)


def test_every_field_of_a_layer_is_looked_at() -> None:
    """What a new vLLM says of a layer is refused or served, and not passed over."""
    assert {*LAYERS, *ELSEWHERE} == {*AttentionSelectorConfig._fields}


@pytest.mark.parametrize("field", ["has_sink", "use_dcp", "use_pcp"])
def test_a_layer_is_not_refused_for_what_is_looked_at_elsewhere(field: str) -> None:
    assert not layer_refusals(LAYER._replace(**{field: True}))


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layers_that_are_served(size: int, dtype: torch.dtype) -> None:
    assert not layer_refusals(LAYER._replace(head_size=size, dtype=dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_vllm_hears_of_it_when_it_asks_for_a_layer_s_backend(name: str) -> None:
    """Under the name that the user has given, and for no backend in its place."""
    selected: Any = SimpleNamespace(name=name)
    assert SparqCpuPlatform.get_attn_backend_cls(selected, LAYER) == BACKENDS[name]
    begins = f"vllm-sparq cannot start: --attention-backend {name.lower()} cannot serve this model: "
    with pytest.raises(ValueError, match=f"^{begins}head size 40 is not one of .*; the model's own sparse .*out"):
        SparqCpuPlatform.get_attn_backend_cls(selected, LAYER._replace(head_size=40, use_sparse=True))


def test_slopes_of_alibi_are_refused_when_the_layer_is_built() -> None:
    """Those of models whose configuration does not say so, as Baichuan's."""
    with pytest.raises(NotImplementedError, match=f"^vllm-sparq cannot start: ALiBi adds a bias.*: {DENSE}$"):
        impl.PagedImpl(num_heads=2, head_size=64, scale=1.0, alibi_slopes=[0.5, 0.25])


def test_a_cache_of_another_backend_is_not_read() -> None:
    layers = {"model.layers.3.attn": SimpleNamespace(impl=SimpleNamespace())}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    message = r"^vllm-sparq cannot start: a layer shares the KV cache of model\.layers\.3\.attn, which runs on another"
    with pytest.raises(NotImplementedError, match=rf"{message} backend: {DENSE}$"):
        impl._source_of(config, "model.layers.3.attn")
    assert impl._source_of(config, None) is None


@pytest.mark.parametrize("name", LOSSLESS)
def test_what_lossless_does_not_go_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, where, value, message = LOSSLESS[name]
    engine = PagedEngine(backend="sparq", options=parse_options({"sparq": {"lossless": True}}), block_size=128)
    assert not lossless_refusals(CONFIG, engine)
    if where:
        *path, attribute = where.split(".")
        monkeypatch.setattr(functools.reduce(getattr, path, CONFIG), attribute, value)
    parsed = parse_options({"sparq": {"lossless": True, **options}})
    (reason,) = lossless_refusals(CONFIG, PagedEngine(backend="sparq", options=parsed, block_size=128))
    assert re.fullmatch(f"sparq option lossless=True {message}", reason), reason


def test_reasons_against_lossless_are_said_one_by_one() -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "lora_config": SimpleNamespace()})
    config.model_config = SimpleNamespace(**{**vars(CONFIG.model_config), "uses_mrope": True, "is_hybrid": True})
    options = parse_options({"sparq": {"lossless": True}})
    assert len(lossless_refusals(config, PagedEngine(backend="sparq", options=options, block_size=128))) == 3
