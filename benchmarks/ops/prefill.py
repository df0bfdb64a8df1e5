"""`vllm-sparq bench ops --op prefill`: a chunk of a prompt over what came before, ours beside vLLM's, interleaved."""

from __future__ import annotations

import ctypes
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table

from vllm_sparq.benchmarks.common.records import case_key
from vllm_sparq.benchmarks.ops.cell import Cache, Call, Cell, Tensors
from vllm_sparq.benchmarks.ops.methods import our_impl
from vllm_sparq.benchmarks.ops.stopwatch import Stopwatch, spread
from vllm_sparq.benchmarks.ops.vllm_op import vllm_calls
from vllm_sparq.console import UsageError
from vllm_sparq.formats import QUANTIZED
from vllm_sparq.ops import native
from vllm_sparq.ops.dispatch import choose

METHODS = {"vllm": None, "dense": "model", **{name: name for name in QUANTIZED}}
"""name -> format of the blocks that hold what came before; None for vLLM's own cache."""

CONTEXTS = (0, 8192, 32768)
"""Tokens before the chunk, where none are named."""

CHUNK = 2048
"""Rows, as vLLM schedules them by default."""

PEAK_US = 20_000
"""How long multiplying is timed for its peak."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """T rows of a prompt of each request, after C tokens that are cached.

    Attributes:
        before: C.
        rows: T.
        cell: the layer; its context is C + T.
    """

    before: int
    rows: int
    cell: Cell

    @classmethod
    def of(cls, cell: Cell, rows: int) -> Chunk:
        """``cell``'s context is what came before.

        Raises:
            UsageError: quantized blocks could not be full.
        """
        before = cell.context
        if before % cell.block_size:
            raise UsageError(
                f"--context {before} is not in whole blocks of {cell.block_size}: of quantized blocks only whole ones "
                f"are read before a chunk; use {before // cell.block_size * cell.block_size}, or another --block-size"
            )
        return cls(before=before, rows=rows, cell=replace(cell, context=before + rows))

    @property
    def multiply_adds(self) -> int:
        """Of q K and of P V: row i sees C + i + 1 tokens."""
        seen = self.rows * self.before + self.rows * (self.rows + 1) // 2
        return 2 * self.cell.batch * self.cell.heads * self.cell.head_dim * seen

    def tensors(self) -> Tensors:
        """Random rows, and K and V of them."""
        torch.manual_seed(0)
        cell, n = self.cell, self.cell.batch * self.rows
        query = torch.randn(n, cell.heads, cell.head_dim, dtype=cell.dtype)
        key, value = (torch.randn(n, cell.kv_heads, cell.head_dim, dtype=cell.dtype) for _ in range(2))
        return Tensors(
            cell=cell,
            query=query,
            out=torch.empty_like(query),
            key=key,
            value=value,
            seq_lens=torch.full((cell.batch,), cell.context, dtype=torch.int32),
            query_start_loc=torch.arange(cell.batch + 1, dtype=torch.int32) * self.rows,
            caches={},
        )

    def calls(self, method: str, t: Tensors) -> Iterator[Call]:
        """How a method is called, at every setting that is worth trying."""
        format = METHODS[method]
        if format is None:
            yield from vllm_calls(t, splits=(False,))  # a context is split over threads for decodes alone
            return
        run, cache = choose("prefill", "cpu").load(), Cache.random(self.cell, self.cell.layout_as(format))
        rows, tables = (t.query, t.key, t.value), (cache.pages, cache.block_table, t.query_start_loc)
        before = torch.full_like(t.seq_lens, self.before)
        yield Call(our_impl("prefill"), lambda: run(*rows, *tables, before, scale=self.cell.scale, out=t.out))


def peak(dtype: torch.dtype, watch: Stopwatch) -> float:
    """Multiply-adds a microsecond of all threads, of the instruction that our kernel for ``dtype`` consists of.

    Raises:
        UsageError: the compiled library has no function for it.
    """
    try:
        multiply = native.library().sparq_multiply_adds
    except AttributeError:
        raise UsageError(f"{native.find().library} cannot say how fast it multiplies. {native.COMPILE_AGAIN}") from None
    multiply.restype, multiply.argtypes = ctypes.c_int64, [ctypes.c_int32, ctypes.c_int64]
    rounds, done = 1000, 0

    def run() -> None:
        nonlocal done
        done = multiply(native.DTYPES[dtype], rounds)

    while (spent := watch.sample(Call("peak", run))) < PEAK_US:
        rounds *= 4
    return done / spent


def describe(chunk: Chunk) -> str:
    return f"{chunk.cell.shape}, batch {chunk.cell.batch}, {chunk.rows:,} tokens after {chunk.before:,}"


def ready_calls(chunk: Chunk, methods: Sequence[str], watch: Stopwatch) -> dict[str, Call]:
    tensors = chunk.tensors()
    return watch.ready({name: chunk.calls(name, tensors) for name in methods}, trials=1)


def measure(
    chunk: Chunk, methods: Sequence[str], repeats: int, watch: Stopwatch, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """One row per method that can run, all of them measured round by round."""
    ready = ready_calls(chunk, methods, watch)
    peaks, samples = watch.rounds(ready, repeats, lambda: peak(chunk.cell.dtype, watch), tick)
    return summarize(chunk, {name: (call.impl, samples[name]) for name, call in ready.items()}, peaks, watch)


def summarize(
    chunk: Chunk, measured: dict[str, tuple[str, list[float]]], peaks: Sequence[float], watch: Stopwatch
) -> list[dict[str, Any]]:
    """The rows of one chunk."""
    medians = {name: statistics.median(samples) for name, (_, samples) in measured.items()}
    most, rows = statistics.median(peaks), []
    for name, (impl, samples) in measured.items():
        (p10, p90), rate = spread(samples), chunk.multiply_adds / medians[name]
        rows.append(
            dict(
                bench="ops_prefill",
                key=key_of(chunk, name, watch),
                impl=impl,
                **_fields(chunk, name, watch),
                median_us=round(medians[name], 1),
                p10_us=round(p10, 1),
                p90_us=round(p90, 1),
                multiply_adds=chunk.multiply_adds,
                gmac_per_s=round(rate / 1e3, 2),
                peak_gmac_per_s=round(most / 1e3, 2),
                share_of_bound=round(rate / most, 3),
                speedup_vs_vllm=round(medians["vllm"] / medians[name], 2) if "vllm" in medians else None,
            )
        )
    return rows


def key_of(chunk: Chunk, method: str, watch: Stopwatch) -> str:
    """Of the record of one method."""
    return case_key("ops_prefill", _fields(chunk, method, watch))


def _fields(chunk: Chunk, method: str, watch: Stopwatch) -> dict[str, Any]:
    """What was measured."""
    cell = chunk.cell
    return dict(
        method=method,
        context=chunk.before,
        chunk=chunk.rows,
        **{name: getattr(cell, name) for name in ("batch", "heads", "kv_heads", "head_dim")},
        block_size=None if METHODS[method] is None else cell.block_size,
        dtype=str(cell.dtype).removeprefix("torch."),
        threads=watch.threads,
        clock=watch.clock,
    )


def chunks(cells: Sequence[Cell], sizes: Sequence[int]) -> list[Chunk]:
    """All combinations."""
    return [Chunk.of(cell, size) for size, cell in itertools.product(sizes, cells)]


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"peak: {statistics.median(row['peak_gmac_per_s'] for row in rows):.0f} GMAC/s"]


def table(rows: Sequence[dict[str, Any]], watch: Stopwatch) -> Table:
    view = Table(
        box=box.SIMPLE_HEAD, title=f"one layer, a chunk of a prompt, {watch.threads} threads, {watch.clock} time"
    )
    for name in ("shape", "batch", "before", "rows", "method", "ms", "p10 .. p90", "GMAC/s", "peak", "x vLLM"):
        view.add_column(name, justify="left" if name in ("shape", "method") else "right", no_wrap=name != "p10 .. p90")
    before = None
    for row in rows:
        shape = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}"
        cell = (shape, str(row["batch"]), f"{row['context']:,}", f"{row['chunk']:,}")
        if before not in (None, cell):
            view.add_section()
        view.add_row(
            *(cell if cell != before else ("",) * len(cell)),
            row["method"],
            f"{row['median_us'] / 1e3:,.1f}",
            f"{row['p10_us'] / 1e3:,.1f} .. {row['p90_us'] / 1e3:,.1f}",
            f"{row['gmac_per_s']:.0f}",
            f"{row['share_of_bound']:.0%}",
            "" if row["speedup_vs_vllm"] is None else f"{row['speedup_vs_vllm']:.2f}",
        )
        before = cell
    return view
