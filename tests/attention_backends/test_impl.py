"""What a layer is made of."""

from __future__ import annotations

import pytest
import torch

from vllm_sparq.attention_backends import impl
from vllm_sparq.config import Options
from vllm_sparq.ops import native


def test_pages_hold_what_the_options_need() -> None:
    def parts(**options: object) -> list[str]:
        return list(impl.page_layout(Options(**options), 64, 128, torch.bfloat16).parts)  # type: ignore[arg-type]

    assert parts() == ["records", "scoring", "ranges", "value_sum"]
    assert parts(scoring="model", mean_value="off") == ["records", "scoring"]
    assert parts(read="dense") == ["records"]


def test_without_kernels_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert impl.slow_ops(impl._choose_ops("cpu")) is None
    missing = native.Found(None, None, "no compiled kernels: reinstall with g++")
    monkeypatch.setattr(native, "find", lambda: missing)
    warning = impl.slow_ops(impl._choose_ops("cpu"))
    assert warning == "sparq attention will be slow: no compiled kernels: reinstall with g++"


def test_layer_index() -> None:
    assert impl._layer_index("model.layers.17.self_attn.attn") == 17
