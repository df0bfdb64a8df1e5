"""What a layer is made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_sparq.attention_backends import engine, impl
from vllm_sparq.config import Options
from vllm_sparq.ops import native
from vllm_sparq.platform import SparqCpuPlatform
from vllm_sparq.reads import READS, HeadShape


def test_pages_hold_what_the_options_need() -> None:
    def parts(*, grouped: bool = False, **options: Any) -> list[str]:
        heads = HeadShape(head_size=64, n_heads=8, n_kv_heads=2 if grouped else 8)
        return list(engine.page_layout(Options(**options), heads, 128, torch.bfloat16).parts)

    assert parts() == ["records", "ranking", "scales", "value_sum"]
    assert parts(grouped=True) == ["records", "ranking", "scales"]
    assert parts(ranking="model", mean_value="off") == ["records", "ranking"]
    assert parts(read="dense") == parts(read="dense", format="int4") == ["records"]
    assert parts(format="int4", mean_value="off") == ["records", "ranking", "scales"]
    kivi = ["key_codes", "key_scales", "value_codes", "value_scales"]
    assert parts(read="dense", format="kivi2") == parts(format="kivi4", mean_value="off") == kivi
    assert parts(format="kivi4") == [*kivi, "value_sum"]
    assert parts(read="spans") == parts(read="spans", format="int8") == ["records", "ranking"]
    assert parts(read="spans", format="kivi4") == [*kivi, "ranking"]


@pytest.mark.parametrize(
    ("options", "max_model_len", "tokens"),
    [
        ({}, 32768, 256),
        ({}, 32767, 128),
        ({"ranking": "int8"}, 65536, 128),
        ({"read": "dense"}, 65536, 128),
        ({"read": "spans"}, 65536, 128),
        ({"format": "int4"}, 65536, 128),
        ({"retention": "window"}, 65536, 128),
    ],
)
def test_blocks_are_longer_where_that_pays(options: dict[str, Any], max_model_len: int, tokens: int) -> None:
    assert engine.preferred_block_size(Options(**options), max_model_len) == tokens


@pytest.mark.parametrize(
    ("given", "options", "tokens"),
    [(False, {}, 128), (True, {}, 16), (False, {"format": "kivi3"}, 16)],
    ids=["chosen", "the user's", "left to the refusal"],
)
def test_a_block_size_is_chosen_where_the_user_sets_none(given: bool, options: dict[str, Any], tokens: int) -> None:
    config: Any = SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="KIVI"), backend_per_kind={}),
        additional_config={"sparq": options},
        model_config=SimpleNamespace(
            max_model_len=65536,
            use_mla=False,
            is_hybrid=False,
            attention_chunk_size=None,
            hf_text_config=SimpleNamespace(),
        ),
        cache_config=SimpleNamespace(block_size=16, user_specified_block_size=given),
    )
    SparqCpuPlatform._choose_block_size(config)
    assert config.cache_config.block_size == tokens


@pytest.mark.parametrize("read", ["sparq", "spans", "dense"])
def test_without_kernels_the_user_is_told(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert impl.slow_ops(impl._choose_ops("cpu", READS[read])) is None
    missing = native.Found(None, None, "no compiled kernels: reinstall with g++")
    monkeypatch.setattr(native, "find", lambda: missing)
    warning = impl.slow_ops(impl._choose_ops("cpu", READS[read]))
    assert warning == "sparq attention will be slow: no compiled kernels: reinstall with g++"


def test_only_ops_that_a_read_calls_are_chosen() -> None:
    """So that a device without kernels of one read still serves the others."""
    assert set(impl._choose_ops("cpu", READS["spans"])) == {"write", "prefill", "dense_decode", "quest_decode", "evict"}
    assert set(impl._choose_ops("cpu", READS["dense"])) == {"write", "prefill", "dense_decode", "evict"}


def test_layer_index() -> None:
    assert impl._layer_index("model.layers.17.self_attn.attn") == 17
