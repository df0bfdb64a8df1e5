"""Cases for the op tests: a frozen `Case`, and the world around one call that makes stray reads and writes visible.

In a `World` pages are permuted, lie apart, and are surrounded by poison; slots and pages that nobody owns hold poison;
unused entries of every int32 argument are 2**31 - 1; query, key and value are slices of one fused tensor, whose rows
past the end are NaN.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops import native
from vllm_sparq.ops.dispatch import IMPLEMENTATIONS, Choice
from vllm_sparq.ops.write.reference import write as reference_write

NAN_BYTE = 0xFF
"""Poison: every byte pattern of it is a NaN in bf16, fp16 and fp32, and the largest code."""

HUGE_BYTE = 0x7B
"""The other poison, finite and huge (6e4 in fp16, 1e36 else): wins every comparison that a NaN would lose."""

UNUSED = 2**31 - 1
"""In every int32 entry that must not be read."""

THREADS = 3
"""Of the CPU kernels: odd, so that nothing divides evenly."""

MOST_WRITTEN = 200
"""Buffers that `build` keeps, as the reference wrote them: every implementation gets the same ones, turn after turn."""

_WRITTEN: dict[object, torch.Tensor] = {}

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch.

    Attributes:
        lens: S per request, new tokens included; 0 is a padding row.
        new: how many of them the step brings; empty for one each (decode).
        sinks: whether each query head has one more logit.
        soft_cap: what logits stay below, or None.
    """

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    ranking: str | None = "int4"
    value_sum: bool = True
    format: str = "model"
    group_size: int | None = None
    positions: bool = False
    attention: bool = False
    lens: tuple[int, ...] = (1, 15, 16, 17, 33)
    new: tuple[int, ...] = ()
    sinks: bool = False
    soft_cap: float | None = None

    def __str__(self) -> str:
        stored = "" if self.format == "model" else f"-{self.format}.{self.layout.group('value')}"
        lens = ".".join(f"{s}+{t}" if self.new else f"{s}" for s, t in zip(self.lens, self.n_new, strict=True))
        return (
            f"h{self.heads}g{self.kv_heads}-d{self.head_size}-n{self.block_size}-{SHORT[self.dtype]}-"
            f"{self.ranking}{'' if self.value_sum else '-nosum'}"
            f"{stored}{'-attention' if self.attention else '-positions' if self.positions else ''}"
            f"{'-sinks' if self.sinks else ''}{f'-cap{self.soft_cap:g}' if self.soft_cap else ''}-s{lens}"
        )

    @property
    def n_new(self) -> tuple[int, ...]:
        return self.new or tuple(min(s, 1) for s in self.lens)

    @property
    def layout(self) -> PageLayout:
        return PageLayout(
            head_size=self.head_size,
            block_size=self.block_size,
            dtype=self.dtype,
            ranking=self.ranking,
            value_sum=self.value_sum,
            format=self.format,
            group_size=self.group_size,
            positions=self.positions or self.attention,
            attention=self.attention,
        )

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def sink_logits(self) -> torch.Tensor | None:
        """fp32 [H]: far above, among and far below what the tokens have."""
        return torch.tensor([3.0, -20.0, 9.0, 0.5, 40.0]).repeat(self.heads)[: self.heads] if self.sinks else None

    def softmax(self, on: str | torch.device) -> dict[str, object]:
        """What an op is told of the softmax beside its scale."""
        sinks = self.sink_logits()
        given: dict[str, object] = {} if sinks is None else {"sinks": sinks.to(on)}
        return given if self.soft_cap is None else {**given, "soft_cap": self.soft_cap}

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

    def tokens(self) -> Tokens:
        """Random tokens: channels of K with own scales and offsets, a few heavy channels of q, V off centre."""
        gen, g, d = self.generator(), self.kv_heads, self.head_size

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen)

        spread, offset = randn(g, d).abs() + 0.5, randn(g, d)
        heavy = 1 + 2 * (torch.rand(d, generator=gen) < 0.2)
        return Tokens(
            query=[(randn(t, self.heads, d) * heavy).to(self.dtype) for t in self.n_new],
            key=[(randn(s, g, d) * spread + offset).to(self.dtype) for s in self.lens],
            value=[(randn(s, g, d) + randn(g, d)).to(self.dtype) for s in self.lens],
        )


@dataclass
class Tokens:
    """Per request: query of the new tokens [T', H, D], key and value of all tokens [S, G, D]."""

    query: list[torch.Tensor]
    key: list[torch.Tensor]
    value: list[torch.Tensor]


@dataclass
class World:
    """Arguments of one call. T' new tokens per request; everything on one device."""

    case: Case
    buffer: torch.Tensor  # uint8, all pages and the poison between them
    pages: Pages
    block_table: torch.Tensor  # int32 [B + 2, M + 2]
    query_start_loc: torch.Tensor  # int32 [B + 1]
    seq_lens: torch.Tensor  # int32 [B + 2], new tokens included
    context_lens: torch.Tensor  # int32 [B + 2], without them
    query: torch.Tensor  # [T + 3, H, D]; rows past T are NaN
    key: torch.Tensor  # [T + 3, G, D]
    value: torch.Tensor  # [T + 3, G, D]
    begun: list[torch.Tensor]  # per request [2, T'', G, D]: K and V of the context's last, unfinished block

    @property
    def n_requests(self) -> int:
        return len(self.case.lens)

    def empty_out(self, rows: int | None = None) -> torch.Tensor:
        """NaN [rows or B, H, D], rows apart by one head more."""
        case = self.case
        shape = (self.n_requests if rows is None else rows, case.heads + 1, case.head_size)
        return torch.full(shape, torch.nan, dtype=case.dtype, device=self.buffer.device)[:, : case.heads]

    def decode(self, run: Callable[..., None], **options: object) -> torch.Tensor:
        """``out`` [B, H, D] of a decode op on the last token of every request."""
        out = self.empty_out()
        query, table = self.query[: self.n_requests], self.block_table
        options |= self.case.softmax(out.device)
        run(query, self.pages, table, self.seq_lens, scale=self.case.scale, out=out, **options)
        return out

    def write(self, run: Callable[..., None]) -> None:
        run(self.key, self.value, self.pages, self.block_table, self.query_start_loc, self.seq_lens)

    def prefill(self, run: Callable[..., None]) -> torch.Tensor:
        """``out`` [T, H, D]."""
        out = self.empty_out(len(self.query))
        new = self.query, self.key, self.value
        table, starts, contexts = self.block_table, self.query_start_loc, self.context_lens
        options = self.case.softmax(out.device)
        if self.case.format != "model":
            *new, options["key_start_loc"] = self._with_begun_blocks()
            contexts = contexts // self.case.block_size * self.case.block_size
        run(*new, self.pages, table, starts, contexts, scale=self.case.scale, out=out, **options)
        return out[: int(starts[-1])]

    def _with_begun_blocks(self) -> tuple[torch.Tensor, ...]:
        """query, key, value and key_start_loc, the tokens of each request's begun block in front of its new ones."""
        starts, rows = self.query_start_loc.tolist(), []
        for begun, first, stop in zip(self.begun, starts[:-1], starts[1:], strict=True):
            rows.append(torch.cat([begun.to(self.key.device), torch.stack([self.key, self.value])[:, first:stop]], 1))
        key_starts = int32([0, *torch.tensor([part.shape[1] for part in rows]).cumsum(0).tolist()])
        key, value = torch.cat(rows, 1)
        return self.query, key, value, key_starts.to(self.key.device)


def build(
    case: Case,
    tokens: Tokens | None = None,
    *,
    written: str = "all",
    poison: int = NAN_BYTE,
    shuffle: int = 0,
    device: str = "cpu",
) -> World:
    """The world of a case.

    Args:
        case: what to build.
        tokens: what to put in, if not `Case.tokens`.
        written: which tokens the reference has written to the pages: ``all``, or ``context`` (all but the new ones).
        poison: the byte in every place that nobody owns.
        shuffle: which permutation of the pages.
        device: where the result lives.
    """
    tokens = tokens or case.tokens()
    layout, n_kv = case.layout, case.kv_heads
    n_blocks = [-(-s // case.block_size) for s in case.lens]
    n_blocks = [n + layout.n_staging_blocks for n in n_blocks]
    n_pages = sum(n_blocks) + 3
    ids = torch.randperm(n_pages, generator=case.generator().manual_seed(shuffle)).int().split([*n_blocks, 3])
    table = torch.full((len(case.lens) + 2, max(n_blocks) + 2), UNUSED, dtype=torch.int32)
    for row, own in zip(table, ids, strict=False):
        row[: len(own)] = own

    # Pages of one block lie 64 bytes apart, blocks 128 bytes more.
    head_stride = layout.page_bytes + 64
    strides = (n_kv * head_stride + 128, head_stride, 1)
    buffer = torch.full((n_pages * strides[0] + 256,), poison, dtype=torch.uint8)

    def pages_of(buffer: torch.Tensor) -> Pages:
        return Pages(buffer.as_strided((n_pages, n_kv, layout.page_bytes), strides, 128), layout)

    context = [s - t for s, t in zip(case.lens, case.n_new, strict=True)]
    fill = list(case.lens) if written == "all" else context
    new = [torch.cat([x[:n] for x, n in zip(of, fill, strict=True)]) for of in (tokens.key, tokens.value)]
    starts = int32([0, *torch.tensor(fill).cumsum(0).tolist()])
    given = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in (*new, table))
    key = (hashlib.sha1(given).digest(), layout, layout.quantized, n_kv, tuple(fill), poison)
    if key not in _WRITTEN:
        reference_write(*new, pages_of(buffer), table, starts, int32(fill))
        _WRITTEN[key] = buffer
        if len(_WRITTEN) > MOST_WRITTEN:
            del _WRITTEN[next(iter(_WRITTEN))]
    buffer = _WRITTEN[key].clone()

    fresh = [
        torch.cat([q.flatten(1), k[n:].flatten(1), v[n:].flatten(1)], 1)
        for q, k, v, n in zip(tokens.query, tokens.key, tokens.value, context, strict=True)
    ]
    width = (case.heads + 2 * n_kv) * case.head_size
    fused = torch.cat([*fresh, torch.full((3, width), torch.nan, dtype=case.dtype)]).to(device)
    query, key, value = fused.unflatten(1, (-1, case.head_size)).split([case.heads, n_kv, n_kv], 1)
    if not case.new and 0 in case.lens:  # decode batches keep a row per request, padding rows too
        rows = torch.full((len(case.lens) + 3, case.heads, case.head_size), torch.nan, dtype=case.dtype)
        rows[: len(case.lens)][torch.tensor(case.lens) > 0] = torch.cat(tokens.query)
        query = rows.to(device)
    buffer = buffer.to(device)
    return World(
        case=case,
        buffer=buffer,
        pages=pages_of(buffer),
        block_table=table.to(device),
        query_start_loc=int32([0, *torch.tensor(case.n_new).cumsum(0).tolist()]).to(device),
        seq_lens=int32([*case.lens, UNUSED, UNUSED]).to(device),
        context_lens=int32([*context, UNUSED, UNUSED]).to(device),
        query=query,
        key=key,
        value=value,
        begun=[
            torch.stack([k[n // case.block_size * case.block_size : n], v[n // case.block_size * case.block_size : n]])
            for k, v, n in zip(tokens.key, tokens.value, context, strict=True)
        ],
    )


def write_in_chunks(case: Case, tokens: Tokens, run: Callable[..., None], cuts: list[int], on: str) -> World:
    """The world of ``case`` written by several calls: request b brings its tokens up to each of ``cuts`` in turn."""
    query = [torch.zeros(s, case.heads, case.head_size, dtype=case.dtype) for s in case.lens]
    world = build(replace(case, new=case.lens), replace(tokens, query=query), written="context", device=on)
    done = [0] * len(case.lens)
    for cut in [*cuts, max(case.lens)]:
        upto = [min(cut, s) for s in case.lens]
        key = torch.cat([k[a:z] for k, a, z in zip(tokens.key, done, upto, strict=True)]).to(on)
        value = torch.cat([v[a:z] for v, a, z in zip(tokens.value, done, upto, strict=True)]).to(on)
        starts = int32([0, *(torch.tensor(upto) - torch.tensor(done)).cumsum(0).tolist()]).to(on)
        run(key, value, world.pages, world.block_table, starts, int32(upto).to(on))
        done = upto
    return world


def int32(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def load(op: str, implementation: str) -> Callable[..., None]:
    """The function, or a visible skip where this machine cannot run it."""
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    if implementation != "cpu":
        return Choice(op, implementation, "test").load()
    found = native.find()
    if found.library is None:
        pytest.skip(f"no CPU kernels: {found.reason}")
    return threaded(Choice(op, implementation, "test").load(), THREADS)


def threaded(run: Callable[..., None], n_threads: int) -> Callable[..., None]:
    """``run`` with so many OpenMP threads, which kernels and torch share."""

    @functools.wraps(run)
    def call(*args: object, **kwargs: object) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            run(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return call


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


ALL = tuple(IMPLEMENTATIONS["write"])
"""Every implementation, for invariants that the reference must keep too."""

KERNELS = tuple(implementation for implementation in ALL if implementation != "reference")


def has(op: str) -> tuple[str, ...]:
    """The implementations of an op, where some are still to come."""
    return tuple(IMPLEMENTATIONS[op])


def each(
    values: Iterable[object], *, tiny: Iterable[object] = (), implementations: Iterable[str] = ALL
) -> list[object]:
    """Parameters (implementation, value). The Triton interpreter is slow and gets ``tiny``, if given, and no other."""
    values, tiny = list(values), list(tiny)
    both = [*values, *(value for value in tiny if value not in values)]
    rows = []
    for implementation in implementations:
        interpreted = implementation == "triton" and not torch.cuda.is_available()
        for value in tiny if tiny and interpreted else both:
            rows.append(pytest.param(implementation, value, id=f"{implementation}-{value}"[:99].replace(" ", "")))
    return rows
