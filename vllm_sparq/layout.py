"""Where each byte of a cached token lives. The only module that knows.

A *page* is one block of one KV head: ``block_size`` tokens in ``page_bytes`` contiguous bytes, cut into parts.

    +----------------------------------+------------------------+------------------+------------+
    | records   [N, 2, D]              | scoring   [D, N/2]     | ranges  [D, 2]   | value_sum  |
    | token-major: K row, then V row   | channel-major codes    | step, zero       | [D] fp32   |
    | one gathered token = one run     | one channel = one run  | fp16 per channel | V before   |
    +----------------------------------+------------------------+------------------+------------+

* ``records``: the tokens as the model made them. Written when a token arrives.
* ``scoring`` and ``ranges``: the low-bit copy of K that SparQ ranks tokens with. Written once, when the block fills;
  the tokens of an unfinished block are ranked from ``records``.
* ``value_sum``: the sum of V over all tokens *before* this block. Written once, when the block gets its first token.
  It depends on the prefix alone, so it stays right under prefix caching, preemption and copy-on-write.

Nothing a method must remember lives outside the page, so whatever vLLM does with blocks, it does with all of it.

Sizes: P pages, G KV heads, N tokens per block, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

ALIGNMENT = 64
"""Every part and every page starts on a cache line (bytes)."""

BLOCK_SIZE_MULTIPLE = 16
"""The codes of one channel must fill whole 8-byte words, two tokens a byte."""

SCORING_BITS = {"int4": 4, "int8": 8}
"""Bits of one scoring code; ``model`` keeps the model's own type and has no codes."""


@dataclass(frozen=True)
class Part:
    """``shape`` elements of ``dtype``, dense, from byte ``offset`` of every page."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """The parts of a page.

    Attributes:
        head_size: D, elements of one key and of one value.
        block_size: N, tokens of a block.
        dtype: element type of K and V, the model's own.
        scoring: ``int4 | int8 | model``, the type of the channel-major copy of K, or None where nothing ranks tokens.
        value_sum: whether the page carries the sum of V before the block.

    Raises:
        ValueError: a block size or head size that the parts cannot be cut for.
    """

    head_size: int
    block_size: int
    dtype: torch.dtype
    scoring: str | None = None
    value_sum: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block size {self.block_size} cannot be cut into pages: it must be a multiple of "
                f"{BLOCK_SIZE_MULTIPLE} tokens. Start with --block-size 128 (fastest on CPU)."
            )
        if self.head_size < 16 or self.head_size % 16:
            raise ValueError(f"head size {self.head_size} is not supported: it must be a multiple of 16 elements.")
        if self.scoring not in (None, "model", *SCORING_BITS):
            raise ValueError(f"scoring {self.scoring!r} is not one of {['model', *SCORING_BITS]}")

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in page order."""
        n, d = self.block_size, self.head_size
        wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = [("records", (n, 2, d), self.dtype)]
        if self.scoring == "model":
            wanted.append(("scoring", (d, n), self.dtype))
        elif self.scoring is not None:
            wanted.append(("scoring", (d, n * SCORING_BITS[self.scoring] // 8), torch.uint8))
            wanted.append(("ranges", (d, 2), torch.float16))
        if self.value_sum:
            wanted.append(("value_sum", (d,), torch.float32))
        parts, offset = {}, 0
        for name, shape, dtype in wanted:
            parts[name] = Part(name, offset, shape, dtype)
            offset = _round_up(offset + parts[name].nbytes, ALIGNMENT)
        return parts

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of one page: the parts, padded so that pages stay aligned and divide into whole bytes per token."""
        last = next(reversed(self.parts.values()))
        return _round_up(last.offset + last.nbytes, math.lcm(ALIGNMENT, self.block_size))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token and KV head, everything included; what the KV cache spec reports to vLLM."""
        return self.page_bytes // self.block_size

    @property
    def overhead(self) -> float:
        """Memory beyond a dense cache of the same type, as a fraction of it."""
        return self.page_bytes / self.parts["records"].nbytes - 1


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Pages:
    """The KV cache of one layer: all pages of all KV heads, with views of their parts.

    Attributes:
        data: uint8 [P, G, page_bytes]; the last dimension is contiguous, pages may lie apart.
        layout: how each page is divided.

    Raises:
        ValueError: ``data`` is not what the layout describes.
    """

    data: torch.Tensor
    layout: PageLayout

    def __post_init__(self) -> None:
        data, want = self.data, self.layout.page_bytes
        if data.dtype != torch.uint8 or data.dim() != 3 or data.shape[2] != want or data.stride(2) != 1:
            raise ValueError(
                f"pages must be uint8 [P, G, {want}] with contiguous pages, "
                f"got {data.dtype} {tuple(data.shape)} with strides {data.stride()}"
            )

    @classmethod
    def empty(cls, n_pages: int, n_kv_heads: int, layout: PageLayout, device: str = "cpu") -> Pages:
        """Uninitialised pages outside an engine: for tests and benchmarks."""
        data = torch.empty(n_pages, n_kv_heads, layout.page_bytes, dtype=torch.uint8, device=device)
        return cls(data, layout)

    @classmethod
    def from_kv_cache(cls, kv_cache: torch.Tensor, layout: PageLayout) -> Pages:
        """The tensor vLLM hands to an attention layer, uint8 [P, G, N, bytes_per_token], seen as pages."""
        return cls(kv_cache.flatten(2), layout)

    def part(self, name: str) -> torch.Tensor:
        """View of one part in every page: [P, G, *shape] of the part's dtype."""
        part = self.layout.parts[name]
        window = self.data[..., part.offset : part.offset + part.nbytes]
        view: torch.Tensor = window.view(part.dtype).unflatten(-1, part.shape)
        return view

    @cached_property
    def keys(self) -> torch.Tensor:
        """[P, G, N, D] in the model's dtype."""
        return self.part("records")[..., 0, :]

    @cached_property
    def values(self) -> torch.Tensor:
        """[P, G, N, D] in the model's dtype."""
        return self.part("records")[..., 1, :]

    @cached_property
    def scoring(self) -> torch.Tensor:
        """The channel-major copy of K: uint8 codes [P, G, D, N/2 | N], or [P, G, D, N] in the model's dtype.

        int4 packs two tokens a byte: token n in the low nibble of byte n, token n + N/2 in the high nibble.
        """
        return self.part("scoring")

    @cached_property
    def ranges(self) -> torch.Tensor:
        """fp16 [P, G, D, 2]: step and zero of each channel; a code c stands for ``zero + step * c``."""
        return self.part("ranges")

    @cached_property
    def value_sum(self) -> torch.Tensor:
        """fp32 [P, G, D]: the sum of V over all tokens before the block."""
        return self.part("value_sum")
