"""Where each byte of a cached token lives. The only module that knows.

A *page* is one block of one KV head: ``block_size`` tokens in ``page_bytes`` contiguous bytes, cut into parts. How the
tokens are stored is the block *format*. ``model`` keeps them as the model made them:

    +----------------------------------+------------------------+------------------+------------+
    | records   [N, 2, D]              | ranking   [D, N/2]     | scales  [D, 2]   | value_sum  |
    | token-major: K row, then V row   | channel-major codes    | scale, zero      | [D] fp32   |
    | one gathered token = one run     | one channel = one run  | fp16 per channel | V before   |
    +----------------------------------+------------------------+------------------+------------+

``int8``, ``int4`` and ``k8v4`` keep a token in one run too, of codes and their scales:

    records [N, R] bytes:   K codes | V codes | K scales | V scales    (filled up to whole words)

``kivi4``, ``kivi2``, ``k4v2`` keep K channel-major, so that it ranks tokens itself (bits and g of K and V may differ):

    key_codes [D, N * bits/8]   key_scales [D, N/g, 2]   value_codes [N, D * bits/8]   value_scales [N, D/g, 2]

* ``records``: written when a token arrives (``model``), or when the block fills (records of codes).
* ``ranking`` and ``scales``: the low-bit copy of K that SparQ ranks tokens with; or, to rank spans of
  `SPAN_TOKENS` neighbours (Quest), ``ranking [N/16, 2, D]``: the least and the largest K of each span and channel.
  Written once, when the block fills; the tokens of an unfinished block are ranked from K itself. For InfLLM both are
  the mean of a span's representative keys, and until then the sum of its queries (`vllm_sparq.ops.represent`).
* ``value_sum``: the sum of V over all tokens *before* this block. Written once, when the block gets its first token.
  It depends on the prefix alone, so it stays right under prefix caching, preemption and copy-on-write.
* ``positions`` and ``attention``, in any format, where tokens may be evicted: which token a slot holds (each KV head
  keeps its own), and how much attention it has had. A token's *slot* is then its place among those that are kept.

**Staging.** A quantized block is quantized once, when it fills. Until then its tokens wait, in the model's own type, in
the *next* blocks of the same request: block b is staged in blocks b + 1 to b + ``n_staging_blocks``, whose own tokens
do not exist yet. The block manager keeps that many blocks ahead of every request. They belong to one request alone
(only full blocks are ever shared), so whatever vLLM does with blocks is right for staged tokens too.

Nothing a method must remember lives outside the pages.

Sizes: P pages, G KV heads, N tokens per block, D head size, g elements per quantization group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_sparq.formats import FORMATS, Coding, Format
from vllm_sparq.reads import SPAN_RANKINGS, SPAN_TOKENS

ALIGNMENT = 64
"""Every part and every page starts on a cache line (bytes)."""

BLOCK_SIZE_MULTIPLE = 16
"""The codes of one channel must fill whole 8-byte words, two tokens a byte; and spans must not cross blocks."""

RANKING_BITS = {"int4": 4, "int8": 8}
"""Bits of one ranking code; ``model`` and what ranks spans are in the model's own type and have no codes."""


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
        dtype: element type of K and V, the model's own; of the scales of quantized formats too.
        format: a key of `vllm_sparq.formats.FORMATS`.
        group_size: g, elements of a quantization group; None for the format's default.
        ranking: ``int4 | int8 | model``, type of the channel-major copy of K; one of `SPAN_RANKINGS` instead; or None.
        value_sum: whether the page carries the sum of V before the block.
        positions: whether it says which token each slot holds; needed where tokens are evicted.
        attention: whether it adds up the attention that each token gets (heavy hitters). Needs positions.
        room: bytes of a page that is larger than its parts, where layers of other kinds share it: for staged tokens.

    Raises:
        ValueError: a block size or head size that the parts cannot be cut for.
    """

    head_size: int
    block_size: int
    dtype: torch.dtype
    format: str = "model"
    group_size: int | None = None
    ranking: str | None = None
    value_sum: bool = False
    positions: bool = False
    attention: bool = False
    room: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block size {self.block_size} cannot be cut into pages: it must be a multiple of "
                f"{BLOCK_SIZE_MULTIPLE} tokens. Start with --block-size 128 (fastest on CPU)."
            )
        if self.head_size < 16 or self.head_size % 16:
            raise ValueError(f"head size {self.head_size} is not supported: it must be a multiple of 16 elements.")
        if self.ranking not in (None, "model", *SPAN_RANKINGS, *RANKING_BITS):
            raise ValueError(f"ranking {self.ranking!r} is not one of {['model', *SPAN_RANKINGS, *RANKING_BITS]}")
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {list(FORMATS)}")
        self._check_group()

    def _check_group(self) -> None:
        fmt, d, g = self.quantized, self.head_size, self.group_size
        if fmt is None or not fmt.has_groups:
            if g is not None:
                raise ValueError(f"format {self.format!r} has no groups, but group_size={g} was given: leave it out")
            return
        if g is not None and (g < 8 or g % 8 or d % g):
            raise ValueError(
                f"group_size={g} does not fit head size {d}: it must be a multiple of 8 that divides {d}; "
                f"leave it out for {(fmt.value if fmt.value.group else fmt.key).default_group(d)}"
            )
        if fmt.channel_keys and self.block_size % (key_group := self.group("key")):
            raise ValueError(
                f"block size {self.block_size} does not hold whole groups of {key_group} tokens, in which "
                f"{self.format!r} quantizes K: use a multiple of {key_group}, best --block-size 128"
            )

    @property
    def quantized(self) -> Format | None:
        """How full blocks are quantized, or None for blocks in the model's own type."""
        return FORMATS[self.format]

    def coding(self, part: str) -> Coding:
        """How the ``key`` or the ``value`` is quantized."""
        assert self.quantized is not None
        return self.quantized.key if part == "key" else self.quantized.value

    def group(self, part: str) -> int:
        """g: elements of a quantization group of the ``key`` or the ``value``."""
        coding = self.coding(part)
        return (self.group_size if coding.group else None) or coding.default_group(self.head_size)

    @property
    def channel_keys(self) -> bool:
        """Whether K itself is channel-major and ranks tokens without a ranking copy."""
        return self.quantized is not None and self.quantized.channel_keys

    @property
    def ranks_tokens(self) -> bool:
        """Whether SparQ can read these pages."""
        return self.ranking not in (None, *SPAN_RANKINGS) or self.channel_keys

    @property
    def record_bytes(self) -> int:
        """Bytes of K and V of one token and KV head in the model's own type."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def staged_per_page(self) -> int:
        """Tokens in the model's own type that fit into a page of a quantized format."""
        return self.page_bytes // self.record_bytes

    @property
    def n_staging_blocks(self) -> int:
        """Blocks after its newest one that a request needs for staging; 0 where nothing is quantized."""
        return 0 if self.quantized is None else -(-self.block_size // self.staged_per_page)

    def staged_at(self, slot: int) -> tuple[int, int]:
        """Where the token in ``slot`` of block b is staged: (i, j) for place j of block b + 1 + i."""
        return divmod(slot, self.staged_per_page)

    @cached_property
    def parts(self) -> dict[str, Part]:
        """The parts by name, in page order."""
        n, d = self.block_size, self.head_size
        wanted = self._token_parts()
        if self.ranking in ("model", *SPAN_RANKINGS):
            of_spans = (n // SPAN_TOKENS, 2, d)
            wanted.append(("ranking", (d, n) if self.ranking == "model" else of_spans, self.dtype))
        elif self.ranking is not None:
            wanted.append(("ranking", (d, n * RANKING_BITS[self.ranking] // 8), torch.uint8))
            wanted.append(("scales", (d, 2), torch.float16))
        if self.value_sum:
            wanted.append(("value_sum", (d,), torch.float32))
        tracked = ("positions", torch.int32, self.positions), ("attention", torch.float32, self.attention)
        wanted += [(name, (n,), dtype) for name, dtype, present in tracked if present]
        parts, offset = {}, 0
        for name, shape, dtype in wanted:
            parts[name] = Part(name, offset, shape, dtype)
            offset = _round_up(offset + parts[name].nbytes, ALIGNMENT)
        return parts

    def _token_parts(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """K and V, as the format stores them."""
        n, d, fmt = self.block_size, self.head_size, self.quantized
        if fmt is None:
            return [("records", (n, 2, d), self.dtype)]
        if not fmt.channel_keys:
            return [("records", (n, self.record_parts[-1]), torch.uint8)]
        return [
            ("key_codes", (d, n * fmt.key.bits // 8), torch.uint8),
            ("key_scales", (d, n // self.group("key"), fmt.key.scale_numbers), self.dtype),
            ("value_codes", (n, d * fmt.value.bits // 8), torch.uint8),
            ("value_scales", (n, d // self.group("value"), fmt.value.scale_numbers), self.dtype),
        ]

    @cached_property
    def record_parts(self) -> tuple[int, int, int, int]:
        """Of a token's record of codes, bytes from its start: V's codes, K's scales, V's scales, the next record.

        A pair of scale and zero point is read as one word, so that it starts at a multiple of its size.
        """
        fmt, d, item = self.quantized, self.head_size, self.dtype.itemsize
        assert fmt is not None
        value_codes = d * fmt.key.bits // 8
        key_scales = value_codes + d * fmt.value.bits // 8
        pair = item * max(fmt.key.scale_numbers, fmt.value.scale_numbers)
        value_scales = _round_up(key_scales + d // self.group("key") * fmt.key.scale_numbers * item, pair)
        end = _round_up(value_scales + d // self.group("value") * fmt.value.scale_numbers * item, pair)
        return value_codes, key_scales, value_scales, end

    @cached_property
    def content_bytes(self) -> int:
        """Bytes that a page needs: the parts, so that pages stay aligned and divide into whole bytes per token."""
        *_, last = self.parts.values()
        return _round_up(last.offset + last.nbytes, math.lcm(ALIGNMENT, self.block_size))

    @property
    def page_bytes(self) -> int:
        """Bytes from one page to the next."""
        return max(self.content_bytes, self.room)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token and KV head, everything included; what the KV cache spec reports to vLLM."""
        return self.content_bytes // self.block_size

    @property
    def token_bytes(self) -> float:
        """Bytes of K and V of one token and KV head as the format stores them, scales included."""
        return self._bytes_of("records", "key_codes", "key_scales", "value_codes", "value_scales")

    @property
    def ranking_bytes(self) -> float:
        """Bytes, per token and KV head, of what ranks tokens: the ranking copy, or channel-major K itself."""
        return self._bytes_of("ranking", "scales") or self._bytes_of("key_codes", "key_scales")

    def _bytes_of(self, *names: str) -> float:
        return sum(self.parts[name].nbytes for name in names if name in self.parts) / self.block_size

    @property
    def overhead(self) -> float:
        """Memory beyond a dense cache of the same type, as a fraction of it."""
        return self.bytes_per_token / self.record_bytes - 1


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

    def part(self, name: str) -> torch.Tensor:
        """View of one part in every page: [P, G, *shape] of the part's dtype."""
        part = self.layout.parts[name]
        window = self.data[..., part.offset : part.offset + part.nbytes]
        return window.view(part.dtype).unflatten(-1, part.shape)  # type: ignore[no-any-return]

    def _of_records(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:  # [P, G, N, count]
        return self.part("records")[..., start : start + count * dtype.itemsize].view(dtype)

    def _codes(self, name: str) -> torch.Tensor:
        layout = self.layout
        if layout.channel_keys:
            return self.part(f"{name}_codes")
        value_codes, key_scales, *_ = layout.record_parts
        start, stop = (0, value_codes) if name == "key" else (value_codes, key_scales)
        return self._of_records(start, stop - start, torch.uint8)

    def _code_scales(self, name: str) -> torch.Tensor:
        layout = self.layout
        if layout.channel_keys:
            return self.part(f"{name}_scales")
        _, key_scales, value_scales, _ = layout.record_parts
        start = key_scales if name == "key" else value_scales
        numbers, n_groups = layout.coding(name).scale_numbers, layout.head_size // layout.group(name)
        scales = self._of_records(start, n_groups * numbers, layout.dtype)
        view: torch.Tensor = scales.unflatten(-1, (n_groups, numbers))
        return view

    @cached_property
    def key_codes(self) -> torch.Tensor:
        """Quantized formats: uint8 [P, G, N, D * bits/8], or channel-major [P, G, D, N * bits/8].

        A row of n codes is cut into 8 / bits equal runs, and byte i holds code i of each, the first run lowest: with
        4 bits code i in the low nibble and code i + n/2 in the high one. ``int8`` codes are signed bytes.
        """
        return self._codes("key")

    @cached_property
    def value_codes(self) -> torch.Tensor:
        """Quantized formats: uint8 [P, G, N, D * bits/8], packed as `key_codes` are."""
        return self._codes("value")

    @cached_property
    def key_scales(self) -> torch.Tensor:
        """In the model's dtype, so that a code c stands for ``zero + scale * c``.

        [P, G, N, D/g, 2] or channel-major [P, G, D, N/g, 2]: scale and zero point; ``int8``: [P, G, N, 1, 1], no zero.
        """
        return self._code_scales("key")

    @cached_property
    def value_scales(self) -> torch.Tensor:
        """[P, G, N, D/g, 2] in the model's dtype (``int8``: [P, G, N, 1, 1]): scale, and zero point."""
        return self._code_scales("value")

    @cached_property
    def staged(self) -> torch.Tensor:
        """Tokens in waiting, the whole page seen as places for them: [P, G, staged_per_page, 2, D], K then V."""
        layout = self.layout
        window = self.data[..., : layout.staged_per_page * layout.record_bytes]
        view: torch.Tensor = window.view(layout.dtype).unflatten(-1, (layout.staged_per_page, 2, layout.head_size))
        return view

    @cached_property
    def keys(self) -> torch.Tensor:
        """Format ``model``: [P, G, N, D] in the model's dtype."""
        return self.part("records")[..., 0, :]

    @cached_property
    def values(self) -> torch.Tensor:
        """Format ``model``: [P, G, N, D] in the model's dtype."""
        return self.part("records")[..., 1, :]

    @cached_property
    def ranking(self) -> torch.Tensor:
        """The channel-major copy of K: uint8 codes [P, G, D, N/2 | N], or [P, G, D, N] in the model's dtype.

        int4 packs two tokens a byte: token n in the low nibble of byte n, token n + N/2 in the high nibble. Of spans:
        [P, G, N/16, 2, D] in the model's dtype, least and largest K of each channel, or twice a representative key.
        """
        return self.part("ranking")

    @cached_property
    def scales(self) -> torch.Tensor:
        """fp16 [P, G, D, 2]: scale and zero point of each channel; a code c stands for ``zero + scale * c``."""
        return self.part("scales")

    @cached_property
    def value_sum(self) -> torch.Tensor:
        """fp32 [P, G, D]: the sum of V over all tokens before the block."""
        return self.part("value_sum")

    @cached_property
    def positions(self) -> torch.Tensor:
        """int32 [P, G, N]: the position, in its request, of the token in each slot."""
        return self.part("positions")

    @cached_property
    def attention(self) -> torch.Tensor:
        """fp32 [P, G, N]: the attention each slot's token has had: mean over the query group, sum over queries."""
        return self.part("attention")
