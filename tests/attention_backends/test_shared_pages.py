"""One size of page for full-attention and sliding-window layers: what is chosen, by the numbers of vLLM's specs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import MultipleOf

from vllm_sparq.attention_backends.shared_pages import LEAST_CAPACITY, SIZES, FullLayers, WindowLayers, choose
from vllm_sparq.layout import PageLayout

FORMATS: dict[str, dict[str, Any]] = {
    "int8": dict(format="int8"),
    "int4": dict(format="int4"),
    "kivi4": dict(format="kivi4"),
    "sparq over int4": dict(format="int4", ranking="int4"),
    "quest over int4": dict(format="int4", ranking="bounds"),
    "h2o over int4": dict(format="int4", positions=True, attention=True),
    "k8v4": dict(format="k8v4"),
    "k4v2": dict(format="k4v2"),
    "kivi2": dict(format="kivi2"),
    "sparq over int8": dict(format="int8", ranking="int4"),
    "quest over kivi2": dict(format="kivi2", ranking="bounds"),
}
N_TOKENS = 2048


def candidates(n_layers: int, head_size: int, **layout: Any) -> list[FullLayers]:
    found = []
    for size in SIZES:
        try:
            pages = PageLayout(head_size=head_size, block_size=size, dtype=torch.bfloat16, **layout)
        except ValueError:
            continue
        found.append(
            FullLayers(
                n_layers=n_layers,
                block_size=size,
                page_bytes=2 * pages.page_bytes,
                staged_bytes=2 * pages.record_bytes if pages.quantized else 0,
                n_tokens=N_TOKENS,
            )
        )
    return found


def windows(n_layers: int, head_size: int, *sizes: int | MultipleOf) -> WindowLayers:
    return WindowLayers(
        n_layers=n_layers, token_bytes=2 * 2 * head_size * 2, n_tokens=N_TOKENS, kernel_sizes=sizes or (MultipleOf(32),)
    )


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("n_windows", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_full_layers_keep_nine_tenths_of_what_the_format_promises(name: str, n_windows: int, head_size: int) -> None:
    full = candidates(1, head_size, **FORMATS[name])
    plain = next(layers for layers in full if layers.block_size == 128)
    shared = choose(full, windows(n_windows, head_size))
    chosen = next(layers for layers in full if layers.block_size == shared.block_size)
    promised = plain.bytes_per_request(plain.page_bytes)
    assert chosen.bytes_per_request(shared.page_bytes) * LEAST_CAPACITY <= promised
    assert math.lcm(shared.block_size, shared.window_block_size) <= 256
    assert shared.page_bytes >= max(chosen.page_bytes, shared.window_block_size * 2 * 2 * head_size * 2)
    assert shared.window_block_size % 32 == 0


def test_what_two_bits_leave_over_is_staged_in() -> None:
    """A page of 32 tokens holds 160 of kivi2 and 512 bytes more: with these 5 blocks ahead are enough, instead of 6."""
    full = candidates(1, 64, format="kivi2")
    plain = next(layers for layers in full if layers.block_size == 128)
    shared = choose(full, windows(1, 64))
    assert (shared.block_size, shared.window_block_size, shared.page_bytes) == (160, 32, 2 * 8192)
    chosen = next(layers for layers in full if layers.block_size == 160)
    assert chosen.page_bytes == 2 * 7680
    assert [chosen.pages_per_request(size) for size in (chosen.page_bytes, shared.page_bytes)] == [13 + 6, 13 + 5]
    ratio = chosen.bytes_per_request(shared.page_bytes) / plain.bytes_per_request(plain.page_bytes)
    assert ratio == pytest.approx(1.09, abs=0.005)


def test_chunks_are_whole_blocks() -> None:
    """A ranking copy makes a page of 128 tokens as large as 146 of a layer of chunks, and 160 do not divide 8,192."""
    local = WindowLayers(n_layers=3, token_bytes=256, n_tokens=4096, kernel_sizes=(MultipleOf(32),), chunk=8192)
    assert local.sizes(146 * 256) == {128, 256}
    assert local.sizes(31 * 256) == {32}
    whole = WindowLayers(n_layers=3, token_bytes=256, n_tokens=4096, kernel_sizes=(MultipleOf(32), 96), chunk=96)
    assert whole.sizes(40 * 256) == {32, 96}
    with pytest.raises(ValueError, match="chunks of 48 tokens"):
        WindowLayers(n_layers=3, token_bytes=256, n_tokens=4096, kernel_sizes=(MultipleOf(32),), chunk=48).sizes(1)


def test_a_size_that_the_user_sets_stays() -> None:
    full = [layers for layers in candidates(1, 64, format="int4") if layers.block_size == 128]
    shared = choose(full, windows(1, 64))
    assert (shared.block_size, shared.window_block_size, shared.page_bytes) == (128, 32, 2 * 128 * 72)


def test_kernels_of_fixed_sizes() -> None:
    shared = choose(candidates(1, 64, format="int4"), windows(1, 64, 16, 32, 64))
    assert shared.window_block_size in (16, 32, 64)


def test_pages_that_are_larger_than_dense_ones() -> None:
    """SparQ's ranking copy: the sliding-window layers keep the longest block that fits."""
    full = FullLayers(n_layers=1, block_size=128, page_bytes=2 * 37120, staged_bytes=0, n_tokens=N_TOKENS)
    shared = choose([full], windows(1, 64))
    assert (shared.block_size, shared.window_block_size, shared.page_bytes) == (128, 128, 2 * 37120)
