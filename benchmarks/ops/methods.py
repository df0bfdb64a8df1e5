"""What `vllm-sparq bench ops` measures: one row of `METHODS` each, and the caches they read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import RANKING_BITS, PageLayout, Pages
from vllm_sparq.ops import native
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.reads import DenseRead, HeadShape, Read, SpansRead, SparqRead


def format_of(method: str) -> str:
    """How the blocks are stored that a method reads."""
    last = method.split("+")[-1]
    return last if last in FORMATS else "model"


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
        native.advise_huge_pages(pages.data)
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


def our_impl(op: str) -> str:
    choice = choose(op, "cpu")
    return f"{choice.implementation}: {choice.reason}"


def decode_calls(t: Tensors, op: str, cache: Cache, **options: object) -> Iterator[Call]:
    run = choose(op, "cpu").load()
    args = (t.query, cache.pages, cache.block_table, t.seq_lens)
    yield Call(our_impl(op), lambda: run(*args, scale=t.cell.scale, out=t.out, **options))


def write_calls(t: Tensors, *, fills: bool) -> Iterator[Call]:
    """Every request's token goes into its last block: in the middle of it, or so that it ``fills`` it."""
    op = choose("write", "cpu").load()
    cache = t.cache("model")
    n = t.cell.block_size
    lens = torch.full_like(t.seq_lens, (cache.block_table.shape[1] - 1) * n + (n if fills else n // 2 + 1))
    args = (t.key, t.value, cache.pages, cache.block_table, t.query_start_loc, lens)
    yield Call(our_impl("write"), lambda: op(*args))


VLLM_ASKS = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""The questions about the CPU, of ``torch.cpu``, by which vLLM chooses its library and its attention's kernel."""

VLLM_SEES = {
    "avx2": (False, False, False),
    "avx512": (True, False, False),
    "avx512_bf16": (True, True, False),
}
"""The answers by which vLLM takes its kernels for one of our instruction sets."""


@contextmanager
def same_instruction_set() -> Iterator[None]:
    """Inside, vLLM loads its kernels for the instruction set that ``VLLM_SPARQ_ISA`` chose of ours, if it did.

    It asks torch what the CPU has, once, and would take the best.
    """
    with ExitStack() as stack:
        for name, has in zip(VLLM_ASKS, VLLM_SEES.get(os.environ.get(native.OVERRIDE, ""), ()), strict=False):
            if not has:
                stack.enter_context(mock.patch.object(torch.cpu, name, return_value=False))
        yield


def vllm_library() -> str:
    """The library of vLLM's kernels that is loaded here, by its name."""
    found = re.search(r"/vllm/(_C\w*)\.abi3\.so", Path("/proc/self/maps").read_text())
    return found[1] if found else "none"


def vllm_kernel(cell: Cell, block_size: int) -> str:
    """The kernel that vLLM's attention takes for such a layer, ready to be called.

    Linux lets a process use AMX's registers once it has asked for them. In an engine the linear layers have.
    """
    with same_instruction_set():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = str(_get_attn_isa(cell.dtype, block_size, cell.head_dim))
    if isa == "amx" and not torch.cpu._init_amx():
        raise RuntimeError("vLLM's attention would use AMX here, which Linux does not grant: take --dtype fp16 or fp32")
    return isa


def vllm_calls(t: Tensors, splits: Sequence[bool] = (False, True)) -> Iterator[Call]:
    """vLLM's own op at every setting worth trying: block sizes, and splitting a context over threads or not.

    It reads a cache of random numbers: its time does not depend on them.
    """
    with same_instruction_set():
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        current_platform.import_kernels()
    cell = t.cell
    if cell.head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return
    out = torch.empty_like(t.query)
    for block_size in (32, 64, 128, 256):
        n_blocks = -(-cell.context // block_size)
        cache = torch.empty(cell.batch * n_blocks, cell.kv_heads, 2 * block_size, cell.head_dim, dtype=cell.dtype)
        native.advise_huge_pages(cache)
        cache[:] = torch.randn(cache.shape[1:], dtype=cell.dtype)
        keys, values = cache.chunk(2, dim=2)
        table = torch.randperm(len(cache), dtype=torch.int32).view(cell.batch, n_blocks)
        isa = vllm_kernel(cell, block_size)
        for split in splits:
            schedule = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=cell.batch,
                num_heads=cell.heads,
                num_kv_heads=cell.kv_heads,
                head_dim=cell.head_dim,
                seq_lens=t.seq_lens,
                dtype=cell.dtype,
                query_start_loc=t.query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa=isa,
                enable_kv_split=split,
            )

            def run(
                keys: torch.Tensor = keys,
                values: torch.Tensor = values,
                table: torch.Tensor = table,
                schedule: torch.Tensor = schedule,
            ) -> None:
                ops.cpu_attention_with_kv_cache(
                    query=t.query,
                    key_cache=keys,
                    value_cache=values,
                    output=out,
                    query_start_loc=t.query_start_loc,
                    seq_lens=t.seq_lens,
                    scale=cell.scale,
                    causal=True,
                    alibi_slopes=None,
                    sliding_window=-1,
                    block_table=table,
                    softcap=0,
                    scheduler_metadata=schedule,
                    s_aux=None,
                )

            setting = f"blocks of {block_size}, {'split' if split else 'no split'}"
            yield Call(f"CPU_ATTN {isa} of {vllm_library()}, {setting}", run)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        summary: what it is.
        calls: how it is called, at every setting that is worth trying.
        bytes_moved: how many it must move.
        layout: of the pages that it works on; None where vLLM's own cache is read.
    """

    summary: str
    calls: Callable[[Tensors], Iterator[Call]]
    bytes_moved: Callable[[Cell], int]
    layout: Callable[[Cell], PageLayout | None]

    def cache_fields(self, cell: Cell) -> dict[str, Any]:
        """How its cache is cut, for keys and lines: tokens of a block, bytes of a token and KV head."""
        layout = self.layout(cell)
        if layout is None:
            return {"block_size": None, "kv_bytes_per_token": cell.token_bytes}
        return {"block_size": layout.block_size, "kv_bytes_per_token": layout.bytes_per_token}


def dense_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "dense_decode", t.cache(format)),
        lambda c: c.bytes_moved(DenseRead(), format),
        lambda c: c.layout_as(format),
    )


def sparq_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "sparq_decode", t.cache(format), read=t.cell.read_over(format)),
        lambda c: c.bytes_moved(c.read_over(format), format),
        lambda c: c.layout_as(format),
    )


def quest_method(format: str, summary: str) -> Method:
    return Method(
        summary,
        lambda t: decode_calls(t, "quest_decode", t.cache(format, bounds=True), read=t.cell.spans_read),
        lambda c: c.bytes_moved(c.spans_read, format),
        lambda c: c.layout_as(format, bounds=True),
    )


QUANTIZED = tuple(name for name, fmt in FORMATS.items() if fmt is not None)

METHODS: dict[str, Method] = {
    "vllm": Method("vLLM's own dense op, at its best setting", vllm_calls, lambda c: c.dense_bytes, lambda c: None),
    "dense": dense_method("model", "our dense op"),
    **{name: dense_method(name, f"the same over {name} blocks") for name in QUANTIZED},
    "sparq": sparq_method("model", "SparQ"),
    **{f"sparq+{name}": sparq_method(name, f"SparQ over {name} blocks") for name in QUANTIZED},
    "quest": quest_method("model", "spans of tokens chosen by their bounds"),
    **{f"quest+{name}": quest_method(name, f"the same over {name} blocks") for name in QUANTIZED},
    "write": Method(
        "appending the step's tokens",
        lambda t: write_calls(t, fills=False),
        lambda c: 2 * c.batch * c.kv_heads * c.token_bytes,
        lambda c: c.layout,
    ),
    "write_last": Method(
        "the same when they fill their blocks, 1 step in a block's tokens: the ranking copy is made",
        lambda t: write_calls(t, fills=True),
        lambda c: c.batch * c.kv_heads * (c.block_size * c.token_bytes // 2 + c.layout.parts["ranking"].nbytes),
        lambda c: c.layout,
    ),
}
"""name -> what is timed. Of several calls, the fastest in a short trial is measured."""
