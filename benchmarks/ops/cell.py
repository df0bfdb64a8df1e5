"""What an op of `vllm-sparq bench ops` is given: one decode step of one layer, and the caches that it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import RANKING_BITS, PageLayout, Pages
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.ops.huge_pages import advise_huge_pages
from vllm_sparq.reads import DenseRead, HeadShape, Read, SpansRead, SparqRead


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One decode step of one layer: B requests of equal context length S.

    Attributes:
        context: S, the new token included.
        batch: B.
        heads: H query heads.
        kv_heads: G.
        head_dim: D.
        dtype: of the model.
        options: of what SparQ reads.
        block_size: N, tokens per block of our pages.
    """

    context: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    options: Options
    block_size: int = PREFERRED_BLOCK_SIZE

    @property
    def compression(self) -> float | None:
        """What r and k follow from; None where one of them was set."""
        chosen = self.options.r is not None or self.options.k is not None
        return None if chosen else self.options.compression

    @property
    def ranking(self) -> str:
        """Type of the channel-major copy of K."""
        return self.options.ranking

    def read_over(self, format: str) -> SparqRead:
        """What SparQ reads of blocks in a format."""
        heads = HeadShape(head_size=self.head_dim, n_heads=self.heads, n_kv_heads=self.kv_heads)
        return SparqRead.resolve(self.options.model_copy(update={"format": format}), heads)

    @property
    def read(self) -> SparqRead:
        return self.read_over("model")

    @property
    def shape(self) -> str:
        """As --shape takes it."""
        return f"{self.heads}/{self.kv_heads}/{self.head_dim}"

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def token_bytes(self) -> int:
        """K and V of one token and KV head in the model's type."""
        return int(2 * self.head_dim * self.dtype.itemsize)

    @property
    def dense_bytes(self) -> int:
        return self.bytes_moved(DenseRead(), "model")

    def bytes_moved(self, read: Read, format: str) -> int:
        """Of the whole step; the newest block counts as one in the format, and all as full."""
        layout = self.layout_as(format, bounds=isinstance(read, SpansRead))
        per_head = read.bytes_moved(layout, self.context)
        return int(self.batch * self.kv_heads * per_head)

    @property
    def spans_read(self) -> SpansRead:
        """As many tokens in whole spans as SparQ reads beside the current one."""
        return SpansRead(min_k=self.read.min_k, k_per_token=self.read.k_per_token, dense_below=self.read.dense_below)

    @property
    def layout(self) -> PageLayout:
        return self.layout_as("model")

    def layout_as(self, format: str, *, bounds: bool = False) -> PageLayout:
        """Pages of a format, with what SparQ needs; or with bounds of spans."""
        quantized = FORMATS[format]
        copy = None if quantized and quantized.channel_keys else self.ranking
        return PageLayout(
            head_size=self.head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
            ranking="bounds" if bounds else copy,
            value_sum=not bounds,
            format=format,
        )


@dataclass(frozen=True)
class Call:
    """Something to time: ``run()`` is one op call, ``impl`` says which code and settings it is."""

    impl: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Cache:
    """Pages, and which of them each request has: int32 [B, M]."""

    pages: Pages
    block_table: torch.Tensor

    @classmethod
    def zeros(cls, cell: Cell, layout: PageLayout) -> Cache:
        n_blocks = -(-cell.context // cell.block_size) + layout.n_staging_blocks
        pages = Pages.empty(cell.batch * n_blocks, cell.kv_heads, layout)
        advise_huge_pages(pages.data)
        pages.data.zero_()
        table = torch.randperm(cell.batch * n_blocks, dtype=torch.int32)
        return cls(pages, table.view(cell.batch, n_blocks))

    @classmethod
    def random(cls, cell: Cell, layout: PageLayout) -> Cache:
        """Pages as normally distributed K and V leave them: random tokens, or random codes and their scales."""
        cache = cls.zeros(cell, layout)
        pages = cache.pages
        if layout.ranking == "bounds":
            pages.ranking[..., 0, :].uniform_(-2.5, -1)
            pages.ranking[..., 1, :].uniform_(1, 2.5)
        if layout.quantized is None:
            pages.part("records").normal_()
        else:
            cache._fill_codes()
        return cache

    def _fill_codes(self) -> None:
        pages, layout, fmt = self.pages, self.pages.layout, self.pages.layout.quantized
        assert fmt is not None
        codes = [pages.key_codes, pages.value_codes]
        scales = [(pages.key_scales, fmt.key.bits), (pages.value_scales, fmt.value.bits)]
        if layout.ranking in RANKING_BITS:
            codes.append(pages.ranking)
            scales.append((pages.scales, RANKING_BITS[layout.ranking]))
        for view in codes:
            view.random_(0, 256)
        for view, bits in scales:
            spread = 5 + 0.5 * torch.randn(view.shape[:-1])
            view[..., 0] = spread / (2**bits - 1)
            view[..., 1:] = -spread[..., None] / 2
        newest = self.block_table[:, -layout.n_staging_blocks :].flatten().long()
        pages.staged[newest] = torch.randn(len(newest), *pages.staged.shape[1:], dtype=layout.dtype)


@dataclass
class Tensors:
    """A decode step's arguments, and caches of random tokens; every request has its own pages."""

    cell: Cell
    query: torch.Tensor
    out: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    caches: dict[PageLayout, Cache]

    def cache(self, format: str, *, bounds: bool = False) -> Cache:
        """Made when it is first asked for."""
        layout = self.cell.layout_as(format, bounds=bounds)
        if layout not in self.caches:
            self.caches[layout] = Cache.random(self.cell, layout)
        return self.caches[layout]

    @classmethod
    def build(cls, cell: Cell) -> Tensors:
        torch.manual_seed(0)
        b, s, g, d = cell.batch, cell.context, cell.kv_heads, cell.head_dim
        cache = Cache.zeros(cell, cell.layout)
        key, value = (torch.randn(s, g, d, dtype=cell.dtype) for _ in range(2))
        start, lens = torch.tensor([0, s], dtype=torch.int32), torch.tensor([s], dtype=torch.int32)
        for row in cache.block_table:
            choose("write", "cpu").load()(key, value, cache.pages, row[None], start, lens)
        query = torch.randn(b, cell.heads, d, dtype=cell.dtype)
        return cls(
            cell=cell,
            query=query,
            out=torch.empty_like(query),
            key=key[-1:].expand(b, g, d).contiguous(),
            value=value[-1:].expand(b, g, d).contiguous(),
            seq_lens=torch.full((b,), s, dtype=torch.int32),
            query_start_loc=torch.arange(b + 1, dtype=torch.int32),
            caches={cell.layout: cache},
        )
