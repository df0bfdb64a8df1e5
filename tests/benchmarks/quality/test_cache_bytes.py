"""`quality_bytes`: what a read of spans moves and holds, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape

SHAPE = CacheShape(n_layers=4, n_heads=8, n_kv_heads=2, head_size=64, dtype=torch.bfloat16, max_model_len=4096)
TOKEN = 2 * 64 * 2
"""Bytes of K and V of a token and KV head."""


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        # k = 2048 / 8 - 2048 / 16 = 128 tokens, 8 spans; 128 spans have bounds of as many bytes as K and V of a token.
        ({"compression": 8}, [(128 + 8 * 16) * TOKEN] * 4),
        ({"compression": 8, "dense_layers": 2}, [2048 * TOKEN] * 2 + [(128 + 8 * 16) * TOKEN] * 2),
        ({"k": 100}, [(128 + 6 * 16) * TOKEN] * 4),
        ({"k": 2048}, [2048 * TOKEN] * 4),
        ({"dense_below": 4000}, [2048 * TOKEN] * 4),
    ],
)
def test_bytes_moved(options: dict[str, Any], layers: list[int]) -> None:
    method = Method.named("quest", {"dense_layers": 0, "dense_below": 0, "min_k": 1, **options})
    assert SHAPE.moved(method, 2048) == 2 * sum(layers)


def test_compression_is_that_of_bytes() -> None:
    for compression in (2, 4, 8):
        options = {"dense_layers": 0, "dense_below": 0, "min_k": 1, "compression": compression}
        method = Method.named("quest", options)
        assert SHAPE.moved(method, 4096) * compression == SHAPE.moved(Method.named("dense"), 4096)


def test_bytes_held() -> None:
    assert SHAPE.held(Method.named("quest"), 1000) == 2 * 4 * TOKEN * 17 / 16
