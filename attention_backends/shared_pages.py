"""Models that mix full attention with sliding windows or chunks: one size of page for both, with the least padding.

vLLM keeps the blocks of all layers of such a model in one pool, in pages of one size, and pads what is smaller. With
one block size for all layers, int4 blocks would be padded to more than three times their size. But layers of different
kinds need not have blocks of one length: sliding-window layers get shorter ones, so that a page holds either.

A page is cut for whole multiples of tokens, so something may be left over. What is chosen is what makes a request
smallest, by the numbers that vLLM's own maximum concurrency follows from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_sparq.attention_backends.engine import LOCAL_KINDS, PREFERRED_BLOCK_SIZE, PagedEngine, heads_of
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE, PageLayout, Pages
from vllm_sparq.scheduler.spec import ChunksSpec, StagedSpec, is_ours

logger = init_logger("vllm.sparq")

SIZES = range(PREFERRED_BLOCK_SIZE // 2, 2 * PREFERRED_BLOCK_SIZE + 1, BLOCK_SIZE_MULTIPLE)
"""Tokens per block of a full-attention layer among which we choose where blocks are quantized: memory was asked for."""

LONGEST_STRIDE = 2 * PREFERRED_BLOCK_SIZE
"""Prefixes are found in the cache at common multiples of the block sizes: no coarser than this (tokens)."""

LEAST_CAPACITY = 0.9
"""What full-attention layers must still hold of what they would in a model without sliding windows."""

TYPICAL_TOKENS = 4096
"""Length of the request that is made smallest, unless the model ends before: staging weighs less in a longer one."""


@dataclass(frozen=True, kw_only=True)
class WindowLayers:
    """The layers of one worker that read a sliding window, or their chunk of the context, alone.

    Attributes:
        n_layers: how many there are.
        token_bytes: of K and V of one token in one of them, all KV heads.
        n_tokens: what a request of `TYPICAL_TOKENS` holds in one of them at most.
        kernel_sizes: tokens per block that their kernels take.
        chunk: tokens of a chunk, which must be whole blocks; None where there are windows.
    """

    n_layers: int
    token_bytes: int
    n_tokens: int
    kernel_sizes: tuple[int | MultipleOf, ...]
    chunk: int | None = None

    def sizes(self, most_bytes: int) -> set[int]:
        """Block sizes whose pages have up to ``most_bytes``, and the next one.

        Raises:
            ValueError: no block that the kernels take divides a chunk.
        """
        found = {size for size in self.kernel_sizes if isinstance(size, int)}
        for size in self.kernel_sizes:
            if isinstance(size, MultipleOf):
                most = most_bytes // (self.token_bytes * size.base) * size.base
                some = range(size.base, max(most, self.chunk or 0) + size.base + 1, size.base)
                fitting = [n for n in some if self.chunk is None or self.chunk % n == 0]
                found |= {*[n for n in fitting if n <= most][-1:], *[n for n in fitting if n > most][:1]}
        if self.chunk is not None:
            found = {n for n in found if self.chunk % n == 0}
        if not found:
            raise ValueError(f"chunks of {self.chunk} tokens cannot be cut into blocks of {self.kernel_sizes}")
        return found


@dataclass(frozen=True, kw_only=True)
class FullLayers:
    """The full-attention layers of one worker, with blocks of one size.

    Attributes:
        n_layers: how many there are.
        block_size: N.
        page_bytes: of one page of one of them, all KV heads.
        staged_bytes: of a token that waits in the model's own type, all KV heads; 0 where none waits.
        n_tokens: of a typical request.
    """

    n_layers: int
    block_size: int
    page_bytes: int
    staged_bytes: int
    n_tokens: int

    def pages_per_request(self, page_bytes: int) -> int:
        """Of a typical request, in one layer, where pages have so many bytes: staged tokens use all of them."""
        n_staging = -(-self.block_size // (page_bytes // self.staged_bytes)) if self.staged_bytes else 0
        return -(-self.n_tokens // self.block_size) + n_staging

    def bytes_per_request(self, page_bytes: int) -> int:
        """The same in bytes."""
        return self.pages_per_request(page_bytes) * page_bytes


@dataclass(frozen=True, kw_only=True)
class SharedPages:
    """What a page of one layer and worker holds, all KV heads: one block of either kind.

    Attributes:
        block_size: N, tokens per block of a full-attention layer.
        window_block_size: the same of a sliding-window layer.
        page_bytes: its size.
    """

    block_size: int
    window_block_size: int
    page_bytes: int

    @property
    def stride(self) -> int:
        """Prefixes are found in the cache at multiples of so many tokens."""
        return math.lcm(self.block_size, self.window_block_size)


def choose(candidates: Sequence[FullLayers], windows: WindowLayers) -> SharedPages:
    """The page that makes a request smallest, if prefixes do not become too coarse and the format keeps its promise."""
    plain = min(candidates, key=lambda full: abs(full.block_size - PREFERRED_BLOCK_SIZE))
    plain_bytes = plain.bytes_per_request(plain.page_bytes)
    found = []
    for full in candidates:
        for window_size in windows.sizes(full.page_bytes):
            page_bytes = max(full.page_bytes, window_size * windows.token_bytes)
            window_pages = -(-windows.n_tokens // window_size) + 1
            pages = SharedPages(block_size=full.block_size, window_block_size=window_size, page_bytes=page_bytes)
            too_coarse = pages.stride > LONGEST_STRIDE
            too_large = full.bytes_per_request(page_bytes) * LEAST_CAPACITY > plain_bytes
            request_bytes = full.n_layers * full.bytes_per_request(page_bytes)
            request_bytes += windows.n_layers * window_pages * page_bytes
            found.append(((too_coarse, too_large, request_bytes, pages.stride), pages))
    return min(found, key=lambda candidate: candidate[0])[1]


def typical_tokens(vllm_config: Any, window: int) -> tuple[int, int]:
    """Tokens of a typical request, and how many of them a sliding-window layer holds while it is read."""
    n_tokens = min(vllm_config.model_config.max_model_len, TYPICAL_TOKENS)
    return n_tokens, min(window - 1 + vllm_config.scheduler_config.max_num_batched_tokens, n_tokens)


def preferred_with_windows(
    vllm_config: Any, engine: PagedEngine, backend_of: Callable[[int], type[AttentionBackend]]
) -> int | None:
    """Tokens per block of full-attention layers beside sliding-window layers, where blocks are quantized.

    None for every other engine: nothing speaks against the size that we prefer anyway.

    Args:
        vllm_config: vLLM's, before the model is loaded.
        engine: ours.
        backend_of: head size -> what the sliding-window layers will run on.
    """
    model = vllm_config.model_config
    kinds: Sequence[str] = getattr(model.hf_text_config, "layer_types", None) or ()
    n_windows, n_full, window = sum(map(kinds.count, LOCAL_KINDS)), kinds.count("full_attention"), None
    if n_windows and n_full and engine.options.format != "model":
        window = model.attention_chunk_size or model.get_sliding_window()
    if window is None:
        return None
    heads = heads_of(model, vllm_config.parallel_config)
    n_tokens, n_held = typical_tokens(vllm_config, window)
    windows = WindowLayers(
        n_layers=n_windows,
        token_bytes=2 * heads.n_kv_heads * heads.head_size * model.dtype.itemsize,
        n_tokens=n_held,
        kernel_sizes=tuple(backend_of(heads.head_size).get_supported_kernel_block_sizes()),
        chunk=model.attention_chunk_size,
    )
    # What a budget must hold grows with the block where tokens are evicted: no longer than it is without windows.
    longest = max(SIZES) if engine.retention is None else PREFERRED_BLOCK_SIZE
    candidates = []
    for size in SIZES:
        if size > longest:
            break
        with contextlib.suppress(ValueError):  # a size that does not hold whole groups
            layout = replace(engine, block_size=size).layout(heads, model.dtype)
            candidates.append(
                FullLayers(
                    n_layers=n_full,
                    block_size=size,
                    page_bytes=heads.n_kv_heads * layout.page_bytes,
                    staged_bytes=heads.n_kv_heads * layout.record_bytes if engine.quantized else 0,
                    n_tokens=n_tokens,
                )
            )
    return choose(candidates, windows).block_size if candidates else None


def share_pages(
    specs: dict[str, KVCacheSpec], vllm_config: Any, backend_of: Callable[[str], type[AttentionBackend]]
) -> dict[str, KVCacheSpec]:
    """The KV cache specs of a worker's layers, those of windows or chunks cut so that a page holds a block of any.

    Unchanged where there are no such layers, where there are others (state spaces), where layers of one kind differ, or
    where vLLM is told to manage all layers alike.

    Args:
        specs: by layer.
        vllm_config: this engine's.
        backend_of: layer -> what it runs on.
    """
    ours: dict[str, Any] = {name: spec for name, spec in specs.items() if is_ours(spec)}
    local = SlidingWindowSpec, ChunkedLocalAttentionSpec
    windows: dict[str, Any] = {name: spec for name, spec in specs.items() if type(spec) in local}
    alike = len(set(ours.values())) == len(set(windows.values())) == 1 and len(ours) + len(windows) == len(specs)
    if not alike or vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return specs
    full, window = next(iter(ours.values())), next(iter(windows.values()))
    if window.page_size_padded is not None:
        return specs
    chunk = window.attention_chunk_size if isinstance(window, ChunkedLocalAttentionSpec) else None
    n_tokens, n_held = typical_tokens(vllm_config, chunk or window.sliding_window)
    shared = choose(
        [
            FullLayers(
                n_layers=len(ours),
                block_size=full.block_size,
                page_bytes=full.unpadded_page_size_bytes,
                staged_bytes=full.num_kv_heads * getattr(full, "staged_bytes", 0),
                n_tokens=n_tokens,
            )
        ],
        WindowLayers(
            n_layers=len(windows),
            token_bytes=window.unpadded_page_size_bytes // window.block_size,
            n_tokens=n_held,
            kernel_sizes=tuple(backend_of(next(iter(windows))).get_supported_kernel_block_sizes(window)),
            chunk=chunk,
        ),
    )
    full = _padded(full, shared.page_bytes)
    window = _padded(replace(window, block_size=shared.window_block_size), shared.page_bytes)
    if chunk is not None:
        window = ChunksSpec.of(window)
    logger.info_once(
        "pages of %s bytes: blocks of %d tokens in full-attention layers (%.1f%% padding), of %d in those of windows "
        "or chunks (%.1f%%); prefixes are cached in multiples of %d tokens",
        f"{shared.page_bytes:,}",
        full.block_size,
        100 * (1 - full.unpadded_page_size_bytes / shared.page_bytes),
        window.block_size,
        100 * (1 - window.unpadded_page_size_bytes / shared.page_bytes),
        shared.stride,
    )
    return {name: full if name in ours else window for name in specs}


def pages_of(kv_cache: torch.Tensor, layout: PageLayout) -> Pages:
    """The tensor that vLLM hands to an attention layer, uint8 [P, G, N, bytes_per_token], seen as pages.

    Where the layout has room, what vLLM pads behind the last KV head of a page is shared out among all of them.

    Raises:
        ValueError: there is not so much.
    """
    if not layout.room:
        return Pages(kv_cache.flatten(2), layout)
    (n_pages, n_heads), apart = kv_cache.shape[:2], kv_cache.stride(0)
    if apart < n_heads * layout.room:
        raise ValueError(f"pages lie {apart} bytes apart, which has no room for {n_heads} of {layout.room} bytes")
    return Pages(kv_cache.as_strided((n_pages, n_heads, layout.room), (apart, layout.room, 1)), layout)


def _padded(spec: Any, page_bytes: int) -> Any:
    if page_bytes == spec.unpadded_page_size_bytes:
        return replace(spec, page_size_padded=None)
    return spec.with_room(page_bytes) if isinstance(spec, StagedSpec) else replace(spec, page_size_padded=page_bytes)
