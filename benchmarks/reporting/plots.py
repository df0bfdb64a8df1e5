"""The pictures of a report, each a matplotlib figure of records. No record of a kind: no picture of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from vllm_sparq.benchmarks.reporting.runs import dense_of, labelled

Records = Sequence[Mapping[str, Any]]

COLOURS = ("#333333", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
"""Distinct for colour-blind readers too; the first one is dense's."""
MARKERS = "osD^vPX*<"


@dataclass(frozen=True)
class Picture:
    """A figure and what a reader should see in it."""

    name: str
    caption: str
    figure: Figure


def style(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Label of a line -> colour and marker, those of dense first; no two of 81 look the same."""
    ordered = sorted(set(labels), key=lambda label: (label.partition(" (")[0] not in (DENSE, "vllm"), label))
    return {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        for i, label in enumerate(ordered)
    }


def line(records: Records, x: str, y: str) -> tuple[list[float], list[float]]:
    """What was measured, in the order of x; never a mean of two lines."""
    points = sorted((record[x], record[y]) for record in records if record.get(y) is not None)
    return [at for at, _ in points], [value for _, value in points]


def fitted(records: Records, y: str = "median_tpot_ms") -> tuple[float, float] | None:
    """Slope and intercept of y over the context; None of fewer than two contexts."""
    contexts, times = line(records, "context", y)
    if len(set(contexts)) < 2:
        return None
    slope, intercept = np.polyfit(contexts, times, 1)
    return float(slope), float(intercept)


def break_even(mine: tuple[float, float], dense: tuple[float, float]) -> float | None:
    """The context from which a method's fitted time is below dense's; None if it never is. 0: always."""
    gained, lost = dense[0] - mine[0], mine[1] - dense[1]
    if gained <= 0:
        return None
    return max(0.0, lost / gained)


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
    lines = labelled(records, ("context", "batch"))
    looks = style([label for label, mine in lines.items() if mine[0]["method"] != SKIPPED])
    for axis, batch in zip(axes[0], batches, strict=True):
        for label, mine in lines.items():
            look = looks.get(label, {"color": "#999999", "linestyle": "--"})
            here = [record for record in mine if record["batch"] == batch]
            if here:
                axis.plot(*line(here, "context", "median_tpot_ms"), label=label, **look)
        contexts_axis(axis, [record["context"] for record in records if record["batch"] == batch])
        axis.set_ylim(bottom=0)
        axis.set_title(f"batch {batch}")
    axes[0][0].set_ylabel("time per output token (ms)")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def ops_speed(records: Records) -> Figure:
    """Speed of one attention op beside vLLM's over the context."""
    timed = [record for record in records if record.get("speedup_vs_vllm") is not None]
    lines = labelled(timed, ("context",))
    figure, axis = plt.subplots(figsize=(7, 4.2 + 0.17 * max(0, len(lines) - 12)))
    looks = style(list(lines))
    for label, mine in lines.items():
        axis.plot(*line(mine, "context", "speedup_vs_vllm"), label=label, **looks[label])
    contexts_axis(axis, [record["context"] for record in timed])
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5x", "1x", "2x", "4x", "8x", "16x", "32x"])
    axis.axhline(1, color="#999999", linewidth=1)
    axis.set_ylabel("speed, times vLLM's own op")
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    return figure


def ops_bandwidth(records: Records) -> Figure:
    """Share of the memory's rate that each op reaches at the longest context."""
    longest = max(record["context"] for record in records)
    here = [
        r for r in records if r["context"] == longest and r.get("bandwidth_gb_per_s") and "write" not in r["method"]
    ]
    shares = {name: r["gb_per_s"] / r["bandwidth_gb_per_s"] for name, (r,) in labelled(here, ()).items()}
    figure, axis = plt.subplots(figsize=(7, 0.32 * len(shares) + 1.2))
    axis.barh(list(shares)[::-1], [100 * share for share in shares.values()][::-1], color=COLOURS[1])
    axis.axvline(100, color="#999999", linewidth=1)
    axis.set_xlabel(f"bytes a method must move, over its time, in % of a plain read of memory ({longest:,} tokens)")
    return figure


def capacity(records: Records) -> Figure:
    """Output tokens per second over the tokens that the KV cache holds."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    lines = labelled(records, ("rate", "request_rate"))
    looks = style(list(lines))
    for label, mine in lines.items():
        tokens = [record["sparq"]["kv_capacity_tokens"] for record in mine]
        axis.plot(tokens, [record["output_throughput"] for record in mine], label=label, linestyle="", **looks[label])
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
    # The rows that a replica is handed at a time follow from how many replicas there are, and so do the machines.
    lines = labelled(records, ("replicas", "batch_size", "machines", "cores"))
    looks = style(list(lines))
    for label, mine in lines.items():
        axis.plot(*line(mine, "replicas", "output_tokens_per_second"), label=label, **looks[label])
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


def quality_points(records: Records, field: str) -> dict[str, list[tuple[float, float]]]:
    """Label -> (bytes, dense = 1; score) of each task and length; dense is of the same model, code and machine."""
    over = ("task", "length", "metric", "lower_is_better", "n", "text")
    found: dict[str, list[tuple[float, float]]] = {}
    for label, mine in labelled(records, over).items():
        pairs = [(one, dense) for one in mine if (dense := dense_of(one, records)) is not None]
        found[label] = [(one[field] / dense[field], one["score"]) for one, dense in pairs if dense.get(field)]
    return {label: points for label, points in found.items() if points}


def quality_bytes(records: Records) -> Figure:
    """Score over the bytes that an output token makes the engine read, and over those that a token is kept in."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True)
    looks = style([label for field in ("kv_bytes_moved", "kv_bytes_held") for label in quality_points(records, field)])
    for axis, field, name in zip(axes, ("kv_bytes_moved", "kv_bytes_held"), ("read", "kept"), strict=True):
        for label, points in quality_points(records, field).items():
            axis.plot(*zip(*points, strict=True), label=label, linestyle="", alpha=0.8, **looks[label])
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"bytes of KV cache {name} per token, dense = 1")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score (of 100)")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), fontsize=7, ncols=5, loc="outside lower center")
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
