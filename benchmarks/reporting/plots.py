"""The pictures of a report, each a matplotlib figure of records. No record of a kind: no picture of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.engine.cases import SKIPPED

Records = Sequence[dict[str, Any]]

COLOURS = ("#333333", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Distinct for colour-blind readers too; the first one is dense's."""
MARKERS = "osD^vPX*<"


@dataclass(frozen=True)
class Picture:
    """A figure and what a reader should see in it."""

    name: str
    caption: str
    figure: Figure


def style(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Method -> colour and marker, dense first."""
    ordered = sorted(set(methods), key=lambda name: (name not in (DENSE, "vllm"), name))
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(ordered)
    }


def line(records: Records, x: str, y: str) -> tuple[list[float], list[float]]:
    """Means of y over x, sorted by x."""
    values: dict[float, list[float]] = defaultdict(list)
    for record in records:
        if record.get(y) is not None:
            values[record[x]].append(record[y])
    return sorted(values), [fmean(values[at]) for at in sorted(values)]


def fitted(records: Records, y: str = "median_tpot_ms") -> tuple[float, float] | None:
    """Slope and intercept of y over the context; None of fewer than two contexts."""
    contexts, times = line(records, "context", y)
    if len(contexts) < 2:
        return None
    slope, intercept = np.polyfit(contexts, times, 1)
    return float(slope), float(intercept)


def break_even(mine: tuple[float, float], dense: tuple[float, float]) -> float | None:
    """The context from which a method's fitted time is below dense's; None if it never is. 0: always."""
    gained, lost = dense[0] - mine[0], mine[1] - dense[1]
    if gained <= 0:
        return None
    return max(0.0, lost / gained)


def by_method(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Method -> its records."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        found[record["method"]].append(record)
    return dict(found)


def contexts_axis(axis: Any, contexts: Sequence[float]) -> None:
    """Powers of two, written as people do."""
    axis.set_xscale("log", base=2)
    ticks = sorted(set(contexts))
    axis.set_xticks(ticks, [f"{t / 1024:g}k" if t >= 1024 else f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("context (tokens)")
    axis.grid(alpha=0.3)


def engine_speed(records: Records) -> Figure:
    """Time per output token over the context, a panel a batch size."""
    batches = sorted({record["batch"] for record in records})
    size = (max(6.5, 4.2 * len(batches) + 1), 4.4)
    figure, axes = plt.subplots(1, len(batches), figsize=size, squeeze=False, layout="constrained")
    looks = style([record["method"] for record in records if record["method"] != SKIPPED])
    for axis, batch in zip(axes[0], batches, strict=True):
        here = [record for record in records if record["batch"] == batch]
        for method, mine in by_method(here).items():
            look = {"color": "#999999", "linestyle": "--"} if method == SKIPPED else looks[method]
            axis.plot(*line(mine, "context", "median_tpot_ms"), label=method, **look)
        contexts_axis(axis, [record["context"] for record in here])
        axis.set_ylim(bottom=0)
        axis.set_title(f"batch {batch}")
    axes[0][0].set_ylabel("time per output token (ms)")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def ops_speed(records: Records) -> Figure:
    """Speed of one attention op beside vLLM's over the context."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    timed = [record for record in records if record.get("speedup_vs_vllm") is not None]
    looks = style([record["method"] for record in timed])
    for method, mine in by_method(timed).items():
        axis.plot(*line(mine, "context", "speedup_vs_vllm"), label=method, **looks[method])
    contexts_axis(axis, [record["context"] for record in timed])
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5x", "1x", "2x", "4x", "8x", "16x", "32x"])
    axis.axhline(1, color="#999999", linewidth=1)
    axis.set_ylabel("speed, times vLLM's own op")
    axis.legend(fontsize=8, ncols=2)
    return figure


def ops_bandwidth(records: Records) -> Figure:
    """Share of the memory's rate that each op reaches at the longest context."""
    longest = max(record["context"] for record in records)
    here = [
        r for r in records if r["context"] == longest and r.get("bandwidth_gb_per_s") and "write" not in r["method"]
    ]
    names = list(dict.fromkeys(record["method"] for record in here))
    shares = [100 * fmean(r["gb_per_s"] / r["bandwidth_gb_per_s"] for r in here if r["method"] == n) for n in names]
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(names) + 1.2))
    axis.barh(names[::-1], shares[::-1], color=COLOURS[1])
    axis.axvline(100, color="#999999", linewidth=1)
    axis.set_xlabel(f"bytes a method must move, over its time, in % of a plain read of memory ({longest:,} tokens)")
    return figure


def capacity(records: Records) -> Figure:
    """Output tokens per second over the tokens that the KV cache holds."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    looks = style([record["method"] for record in records])
    for method, mine in by_method(records).items():
        tokens = [record["sparq"]["kv_capacity_tokens"] for record in mine]
        axis.plot(tokens, [record["output_throughput"] for record in mine], label=method, linestyle="", **looks[method])
    axis.set_xlabel("tokens that the KV cache holds, at equal memory")
    axis.set_ylabel("output tokens per second")
    axis.set_xlim(0, 1.1 * axis.dataLim.xmax)
    axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def scaling(records: Records) -> Figure:
    """Output tokens per second over the number of replicas."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    looks = style([record["method"] for record in records])
    for method, mine in by_method(records).items():
        axis.plot(*line(mine, "replicas", "output_tokens_per_second"), label=method, **looks[method])
    axis.set_xticks(sorted({record["replicas"] for record in records}))
    axis.set_xlabel("replicas")
    axis.set_ylabel("output tokens per second, all replicas")
    axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def needles(examples: Records) -> Figure:
    """Share of needles found, by depth and length, a panel a method."""
    methods = list(style([example["method"] for example in examples]))
    lengths = sorted({example["length"] for example in examples})
    bins = np.linspace(0, 1, 6)
    figure, axes = plt.subplots(1, len(methods), figsize=(2.6 * len(methods) + 1.5, 3), squeeze=False, sharey=True)
    for axis, method in zip(axes[0], methods, strict=True):
        grid = np.full((5, len(lengths)), np.nan)
        for column, length in enumerate(lengths):
            for row in range(5):
                scores = [
                    example["score"]
                    for example in examples
                    if example["method"] == method
                    and example["length"] == length
                    and min(4, int(np.searchsorted(bins, example["depth"], "right")) - 1) == row
                ]
                if scores:
                    grid[row, column] = fmean(scores)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(method, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7, rotation=45)
        axis.set_yticks(range(5), ["start", "", "middle", "", "end"])
        axis.set_xlabel("tokens", fontsize=8)
    axes[0][0].set_ylabel("where the needle is")
    figure.colorbar(image, ax=axes[0].tolist(), label="share found")
    return figure


def quality_bytes(records: Records) -> Figure:
    """Score over the bytes that an output token makes the engine read, and over those that a token is kept in."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    looks = style([record["method"] for record in records])
    dense = {(r["task"], r.get("length")): r for r in records if r["method"] == DENSE}
    for axis, field, label in zip(axes, ("kv_bytes_moved", "kv_bytes_held"), ("read", "kept"), strict=True):
        for method, mine in by_method(records).items():
            known = [(r, dense[r["task"], r.get("length")]) for r in mine if (r["task"], r.get("length")) in dense]
            shares = [one[field] / beside[field] for one, beside in known]
            axis.plot(
                shares, [one["score"] for one, _ in known], label=method, linestyle="", alpha=0.8, **looks[method]
            )
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"bytes of KV cache {label} per token, dense = 1")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score (of 100)")
    axes[0].legend(fontsize=8)
    return figure


Draw = Callable[[Records], Figure]

PICTURES: dict[str, tuple[Draw, str]] = {
    "engine-speed": (
        engine_speed,
        "Lower is better. Dense attention grows with the context, since every output token reads the whole cache; a "
        "method pays where its line lies below. The dashed line has no attention at all: no kernel can get below it.",
    ),
    "ops-speed": (ops_speed, "Higher is better: how many times faster than vLLM's own attention op one op of ours is."),
    "ops-bandwidth": (
        ops_bandwidth,
        "How close each op comes to the machine's memory rate. A bar far from 100% leaves something to gain.",
    ),
    "capacity": (
        capacity,
        "Up and to the right is better: right means more tokens in the same memory, up means more answers per second.",
    ),
    "scaling": (scaling, "Twice the replicas should give twice the rate, as long as each has cores of its own."),
    "needles": (needles, "Green: the fact hidden at that depth of a text of that length was found and repeated."),
    "quality-bytes": (
        quality_bytes,
        "Up and to the left is better: good answers from few bytes. A mark is a task at a length.",
    ),
}
"""Name -> how it is drawn, and what to see in it."""


def draw(name: str, records: Records) -> Picture:
    """One of `PICTURES`."""
    make, caption = PICTURES[name]
    figure = make(records)
    figure.set_layout_engine("constrained")
    return Picture(name=name, caption=caption, figure=figure)
