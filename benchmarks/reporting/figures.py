"""docs/figures/*.svg, made of the recorded results: `vllm-sparq report --documents`.

The same results and the same matplotlib give the same bytes. Only lines of a clean tree count, and every ratio is
within one run.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_sparq.benchmarks.common.lines import replace_text
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting.runs import BUNDLED, SHAPE, dense_of, of_model

RESULTS = Path(__file__).parents[1] / "results"
FOLDER = Path(__file__).parents[2] / "docs" / "figures"

Record = Mapping[str, Any]
Point = tuple[float, float]

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vllm-sparq",  # else ids are drawn at random
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

BATCH = 8
SPARQ = 'sparq {"r": 16, "k": 128}'
SPEED = {"H2O": "h2o", "SparQ, fixed": SPARQ, "SparQ": "sparq", "quantized": "kivi"}
"""Family -> method of `bench engine`."""

NOTES = {
    "H2O": "H2O, 1,024 tokens kept",
    "SparQ, fixed": "SparQ, r = 16, k = 128",
    "SparQ": "SparQ, 1/8 of the bytes",
    "quantized": "KIVI, 4 bits, dense read",
}
"""Family -> what was measured of it, for the legend."""

LENGTH = 1024
ANSWERS = {
    "dense": ("dense",),
    "SparQ": ("sparq 1/8", "sparq 1/4", "sparq 1/2"),
    "Quest": ("quest 1/8", "quest 1/4", "quest 1/2"),
    "quantized": ("kivi2", "int4", "kivi4", "int8"),
    "streaming": ("streaming 1/8", "streaming 1/4", "streaming 1/2"),
    "H2O": ("h2o 1/8", "h2o 1/4", "h2o 1/2"),
}
"""Family -> methods of `eval`, in the order of bytes read."""

LOOKS = {
    "dense": ("#37352f", "*"),
    "SparQ": ("#0b6e99", "o"),
    "SparQ, fixed": ("#5aa9c9", "v"),
    "Quest": ("#d9730d", "s"),
    "quantized": ("#0f7b6c", "^"),
    "streaming": ("#ad1a72", "D"),
    "H2O": ("#6940a5", "v"),
}
"""Family -> color and marker."""

GRAY = "#777777"


def speed_lines(records: Sequence[Record]) -> tuple[dict[str, list[Point]], list[Point]]:
    """Family -> (context, times vLLM's speed), and the bound that SparQ's run found at each context.

    The newest clean run of each point; `BATCH` requests.
    """
    found = {
        (r["method"], r["context"]): r
        for r in of_model(SHAPE, records)
        if r.get("bench") == "engine" and r["batch"] == BATCH and not r["dirty"]
    }
    contexts = sorted(context for method, context in found if method == SPARQ)
    lines = {
        family: [(c, found[method, c]["speedup_vs_vllm"]) for c in contexts if (method, c) in found]
        for family, method in SPEED.items()
    }
    return lines, [(c, found[SPARQ, c]["amdahl_bound"]) for c in contexts]


def answer_lines(records: Sequence[Record]) -> dict[str, list[Point]]:
    """Family -> (bytes read per output token, dense = 1; score of 100), means over all tasks of `eval`."""
    found = {
        (r["method"], r["task"]): r
        for r in of_model(BUNDLED, records)
        if r.get("bench") == "quality" and r["length"] == LENGTH and not r["dirty"] and r["task"] != "text"
    }
    tasks = list(dict.fromkeys(task for method, task in found if method == "sparq 1/8"))

    def point(method: str) -> Point:
        mine = [found[method, task] for task in tasks]
        rows = [(r, d) for r in mine if (d := dense_of(r, records))]
        return fmean(r["kv_bytes_moved"] / d["kv_bytes_moved"] for r, d in rows), fmean(r["score"] for r, _ in rows)

    return {family: [point(method) for method in methods] for family, methods in ANSWERS.items()}


def speed_figure(axes: Any, records: Sequence[Record]) -> None:
    """Speed against context."""
    lines, bound = speed_lines(records)
    axes.plot(*zip(*bound, strict=True), label="attention that takes no time", color=GRAY, linestyle=":")
    for family, points in lines.items():
        color, marker = LOOKS[family]
        axes.plot(*zip(*points, strict=True), label=NOTES[family], color=color, marker=marker)
    axes.axhline(1, color=GRAY, linewidth=0.8)
    axes.annotate("vLLM, dense", (bound[0][0], 1), xytext=(0, -11), textcoords="offset points", color=GRAY)
    axes.set_xscale("log", base=2)
    axes.set_xticks([c for c, _ in bound], [f"{c // 1024}k" for c, _ in bound])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens of context, {BATCH} requests")
    axes.set_ylabel("output tokens per second, vLLM = 1")
    axes.legend(loc="upper left")


def answers_figure(axes: Any, records: Sequence[Record]) -> None:
    """Answers against bytes read."""
    for family, points in answer_lines(records).items():
        color, marker = LOOKS[family]
        axes.plot(*zip(*points, strict=True), label=family, color=color, marker=marker, linewidth=1)
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, 102)
    axes.set_xlabel("bytes of KV cache read per output token, dense = 1")
    axes.set_ylabel(f"mean score of four tasks, {LENGTH:,} tokens")
    axes.legend(loc="center right")


FIGURES: dict[str, Callable[[Any, Sequence[Record]], None]] = {"speed": speed_figure, "answers": answers_figure}
"""Name of the file -> what draws it."""


def drawn(name: str, records: Sequence[Record]) -> str:
    """The figure as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FIGURES[name](figure.subplots(), records)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def write_figures() -> list[Path]:
    """Write the figures anew; where they are."""
    records = read_records(RESULTS)
    for name in FIGURES:
        replace_text(FOLDER / f"{name}.svg", drawn(name, records))
    return [FOLDER / f"{name}.svg" for name in FIGURES]
