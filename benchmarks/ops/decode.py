"""`vllm-sparq bench ops`: one decode step of one attention layer, ours beside vLLM's, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from vllm_sparq.benchmarks.common.records import case_key
from vllm_sparq.benchmarks.ops.cell import Call, Cell, Tensors
from vllm_sparq.benchmarks.ops.methods import METHODS, format_of
from vllm_sparq.benchmarks.ops.stopwatch import Stopwatch, microseconds, spread

CONTEXTS = (1024, 4096, 16384, 65536)
"""Tokens of each request, where none are named."""


def describe(cell: Cell) -> str:
    return f"{cell.shape}, batch {cell.batch}, {cell.context:,} tokens"


def ready_calls(cell: Cell, methods: Sequence[str], watch: Stopwatch) -> dict[str, Call]:
    tensors = Tensors.build(cell)
    return watch.ready({name: METHODS[name].calls(tensors) for name in methods})


def measure(cell: Cell, methods: Sequence[str], repeats: int, watch: Stopwatch, tick: Callable[[], None]) -> list[dict]:
    """One row per method that can run, all of them measured round by round."""
    ready = ready_calls(cell, methods, watch)
    bandwidth, samples = watch.rounds(ready, repeats, watch.bandwidth, tick)
    return summarize(cell, {name: (call.impl, samples[name]) for name, call in ready.items()}, bandwidth, watch)


def summarize(
    cell: Cell, measured: dict[str, tuple[str, list[float]]], bandwidth: Sequence[float], watch: Stopwatch
) -> list[dict[str, Any]]:
    """The rows of one cell."""
    medians = {name: statistics.median(samples) for name, (_, samples) in measured.items()}
    rows = []
    for name, (impl, samples) in measured.items():
        moved, (p10, p90) = METHODS[name].bytes_moved(cell), spread(samples)
        rows.append(
            dict(
                bench="ops",
                key=key_of(cell, name, watch),
                method=name,
                impl=impl,
                context=cell.context,
                batch=cell.batch,
                heads=cell.heads,
                kv_heads=cell.kv_heads,
                head_dim=cell.head_dim,
                **METHODS[name].cache_fields(cell),
                dtype=str(cell.dtype).removeprefix("torch."),
                r=cell.read_over(format_of(name)).r,
                k=cell.read_over(format_of(name)).k(cell.context),
                compression=cell.compression,
                ranking=cell.ranking,
                threads=watch.threads,
                clock=watch.clock,
                median_us=round(medians[name], 2),
                p10_us=round(p10, 2),
                p90_us=round(p90, 2),
                bytes_moved=moved,
                gb_per_s=round(moved / 1e3 / medians[name], 3),
                bandwidth_gb_per_s=round(statistics.median(bandwidth), 2),
                speedup_vs_vllm=_ratio(medians, "vllm", name),
                speedup_vs_dense=_ratio(medians, "dense", name),
            )
        )
    return rows


def key_of(cell: Cell, method: str, watch: Stopwatch) -> str:
    """Of the record of one method in one cell."""
    fields = dict(
        method=method,
        **{name: getattr(cell, name) for name in ("context", "batch", "heads", "kv_heads", "head_dim", "ranking")},
        **METHODS[method].cache_fields(cell),
        dtype=str(cell.dtype),
        r=cell.read_over(format_of(method)).r,
        k=cell.read_over(format_of(method)).k(cell.context),
        threads=watch.threads,
        clock=watch.clock,
    )
    return case_key("ops", fields)


def _ratio(medians: dict[str, float], base: str, name: str) -> float | None:
    return round(medians[base] / medians[name], 2) if base in medians and not name.startswith("write") else None


def break_even(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, ...], int | None]:
    """(batch, H, G, D, N) -> the shortest measured context from which SparQ was never slower than our dense op."""
    found: dict[tuple[int, ...], int | None] = {}
    lost: set[tuple[int, ...]] = set()
    for row in sorted(rows, key=lambda row: -row["context"]):
        if row["method"] != "sparq" or row["speedup_vs_dense"] is None:
            continue
        key = (row["batch"], row["heads"], row["kv_heads"], row["head_dim"], row["block_size"])
        found.setdefault(key, None)
        if row["speedup_vs_dense"] < 1:
            lost.add(key)
        elif key not in lost:
            found[key] = row["context"]
    return found


def table(rows: Sequence[dict[str, Any]], watch: Stopwatch) -> Table:
    view = Table(box=box.SIMPLE_HEAD, title=f"one layer, one decode step, {watch.threads} threads, {watch.clock} time")
    for name in (
        "shape",
        "batch",
        "context",
        "method",
        "block",
        "µs",
        "p10 .. p90",
        "GB/s",
        "memory",
        "x vLLM",
        "x dense",
    ):
        view.add_column(name, justify="left" if name in ("shape", "method") else "right", no_wrap=name != "p10 .. p90")
    before = None
    for row in rows:
        cell = (f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}", str(row["batch"]), f"{row['context']:,}")
        if before not in (None, cell):
            view.add_section()
        ratios = [f"{r:.2f}" if r is not None else "" for r in (row["speedup_vs_vllm"], row["speedup_vs_dense"])]
        view.add_row(
            *(cell if cell != before else ("", "", "")),
            row["method"],
            f"{row['block_size'] or ''}",
            microseconds(row["median_us"]),
            f"{row['p10_us']:,.0f} .. {row['p90_us']:,.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{100 * row['gb_per_s'] / row['bandwidth_gb_per_s']:.0f}%",
            *ratios,
        )
        before = cell
    return view


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"memory: {statistics.median(row['bandwidth_gb_per_s'] for row in rows):.1f} GB/s"]
    for (batch, *shape, block_size), context in break_even(rows).items():
        where = "at no context measured" if context is None else f"from {context:,} tokens on"
        layer = "/".join(map(str, shape))
        lines.append(f"batch {batch}, {layer}, blocks of {block_size}: SparQ beats our dense op {where}")
    return lines
