"""What the demo found, as a table for people and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_sparq import __version__, compat
from vllm_sparq.backends import BACKENDS
from vllm_sparq.benchmarks.common.server import Completion
from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.config import Options
from vllm_sparq.reads import HeadShape, Read

TABLE_WIDTH = 80
"""Columns of the terminal that the table takes without questions and right answers, which get what is left."""


@dataclass(frozen=True)
class Side:
    """What one server's worker says that it runs."""

    layers: dict[str, dict[str, Any]]

    def problem(self, *, ours: bool) -> str | None:
        """Why the comparison would be a lie; None if it is not."""
        n_ours = sum(layer["backend"] in BACKENDS for layer in self.layers.values())
        if ours and not n_ours:
            return f"the worker that should run SparQ runs {self.classes() or 'no attention at all'}"
        if not ours and n_ours:
            return f"the worker that should run dense attention runs {self.classes()}"
        return None

    def classes(self) -> str:
        """Such as "4 × PagedImpl (backend SPARQ)"."""
        counts = Counter(f"{layer['impl']} (backend {layer['backend']})" for layer in self.layers.values())
        return ", ".join(f"{n} × {name}" for name, n in counts.items())

    def ops(self) -> dict[str, str]:
        """Op -> implementation and reason; empty for a backend that is not ours."""
        return next((layer["ops"] for layer in self.layers.values() if "ops" in layer), {})


@dataclass(frozen=True)
class Row:
    """One question, with both answers.

    Attributes:
        n_read: cached tokens that SparQ's first decode step read; the dense one read `context_len`.
    """

    example: tasks.Example
    sparq: Completion
    dense: Completion
    n_read: int
    context_len: int


@dataclass(frozen=True)
class Run:
    """One run of the demo."""

    model: Path
    bundled: bool
    options: Options
    read: Read
    heads: HeadShape
    sides: dict[str, Side]
    rows: list[Row]
    seconds: float

    def answers(self, side: str, rows: Sequence[Row] | None = None) -> list[Completion]:
        return [getattr(row, side) for row in (self.rows if rows is None else rows)]

    def scores(self, side: str) -> list[float]:
        """One per question, 0.0 to 1.0."""
        return [
            tasks.score(row.example, answer.text) for row, answer in zip(self.rows, self.answers(side), strict=True)
        ]

    def longest(self) -> list[Row]:
        """The rows of the longest context: within a tenth, since prompts differ by some tokens."""
        longest = max(row.context_len for row in self.rows)
        return [row for row in self.rows if row.context_len > 0.9 * longest]

    def ms_per_token(self, side: str) -> float:
        """Time per output token at the longest context."""
        timed = [answer for answer in self.answers(side, self.longest()) if answer.s_per_token is not None]
        n_steps = sum(answer.n_tokens - 1 for answer in timed)
        return 1000 * sum(answer.decode_s or 0.0 for answer in timed) / n_steps if n_steps else math.nan


def print_run(console: Console, run: Run) -> None:
    """The table, what ran in the workers, and the summary."""
    console.print()
    console.print(_table(run, console.width))
    console.print(_workers(run))
    console.print(Padding(_summary(run), (1, 1, 1, 1)), highlight=False)


def _table(run: Run, width: int) -> Table:
    left = width - TABLE_WIDTH
    n_texts = 2 if left >= 36 else int(left >= 12)  # the right answer comes first
    shown = min(left // n_texts - 2, 28) if n_texts else 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    names = ["task", "context", "depth", *["question", "right answer"][2 - n_texts :], "SparQ", "dense"]
    for name in [*names, "tokens read\nSparQ / dense", "ms per token\nSparQ / dense"]:
        to_the_right = name in ("context", "depth") or "/" in name
        table.add_column(name, justify="right" if to_the_right else "left", no_wrap=True)
    before = None
    for row in run.rows:
        # Prompts of one length differ by some tokens; a jump is the next length.
        if before is not None and row.context_len > 1.1 * before:
            table.add_section()
        before = row.context_len
        asked = row.example.prompt.rsplit("\n", 1)[-1]
        texts = [_shorten(asked, shown, from_end=True), _shorten(row.example.answer, shown)]
        table.add_row(
            row.example.task,
            f"{row.context_len - 1:,}",
            "" if row.example.depth is None else f"{row.example.depth:.0%}",
            *texts[2 - n_texts :],
            _answer(row.example, row.sparq.text),
            _answer(row.example, row.dense.text),
            f"{row.n_read:,} / {row.context_len:,}",
            f"{_ms(row.sparq)} / {_ms(row.dense)}",
        )
    return table


def _shorten(text: str, shown: int, *, from_end: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= shown:
        return text
    return "…" + text[-shown + 1 :] if from_end else text[: shown - 1] + "…"


def _answer(example: tasks.Example, output: str) -> Text:
    """A mark, and what was said where it is not right; a passage counts by how far it is right."""
    score = tasks.score(example, output)
    if score == 1:
        return Text("✓", style="green")
    if example.task == "repetition":
        return Text(f"◐ {score:.0%}", style="yellow") if score > 0 else Text("✗", style="red")
    return Text(f"✗ {_shorten(output, 8)}", style="red")


def _ms(answer: Completion) -> str:
    return "–" if answer.s_per_token is None else f"{1000 * answer.s_per_token:.1f}"


def _workers(run: Run) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]in the workers[/]", "SparQ:", run.sides["sparq"].classes())
    by_choice: dict[str, list[str]] = {}
    for op, choice in run.sides["sparq"].ops().items():
        by_choice.setdefault(choice, []).append(op)
    for choice, ops in by_choice.items():
        table.add_row("", "", f"{', '.join(ops)}: {choice}")
    table.add_row("", "dense:", run.sides["dense"].classes())
    return table


def _summary(run: Run) -> str:
    n = len(run.rows)
    scores = {side: run.scores(side) for side in ("sparq", "dense")}
    right = {side: sum(score == 1 for score in values) for side, values in scores.items()}
    sparq, dense = run.ms_per_token("sparq"), run.ms_per_token("dense")
    sentences = [
        f"[bold]SparQ answered {right['sparq']} of {n} in full, dense attention {right['dense']}[/] (mean score "
        f"{sum(scores['sparq']) / n:.2f} and {sum(scores['dense']) / n:.2f}).",
        _what_was_read(run),
        f"There a token took {sparq:.1f} ms with SparQ and {dense:.1f} ms with dense attention "
        f"({sparq / dense:.2f} times as long).",
    ]
    if any(choice.startswith("reference") for choice in run.sides["sparq"].ops().values()):
        sentences.append("[bold yellow]SparQ ran pure-torch reference code, so its times mean nothing.[/]")
    elif run.bundled:
        sentences.append(
            "Speed is not the point here: in a model of 4 million parameters, attention over a few thousand tokens is "
            "a small part of a step. `vllm-sparq bench ops` shows where it pays."
        )
    else:
        sentences.append("`vllm-sparq bench ops` shows at which context lengths the ops pay on this machine.")
    return " ".join([*sentences, f"(The demo took {run.seconds:.0f} s.)"])


def _what_was_read(run: Run) -> str:
    longest = run.longest()
    n_read = round(sum(row.n_read for row in longest) / len(longest))
    context = round(sum(row.context_len for row in longest) / len(longest))
    if run.options.lossless:
        return (
            f"SparQ drafted tokens, and dense attention over all of {context:,} tokens of context verified every one: "
            "with lossless its answers are given."
        )
    if run.options.retention != "all" and n_read < context:
        return (
            f"At {context:,} tokens of context a SparQ step read {n_read:,} of them, "
            f"[bold]{context / n_read:.1f} times fewer[/] than a dense one: of what retention "
            f"{run.options.retention!r} had kept."
        )
    if n_read == context:
        return f"With these options a SparQ step reads all of {context:,} tokens of context."
    ranked_by = run.read.describe(run.options, run.heads)[0]
    return (
        f"At {context:,} tokens of context a SparQ step read {n_read:,} of them, "
        f"[bold]{context / n_read:.1f} times fewer[/] than a dense one, after ranking them all: {ranked_by}."
    )


def run_as_json(run: Run) -> dict[str, Any]:
    """Everything, in plain types."""
    return {
        "vllm_sparq": __version__,
        "vllm": str(compat.vllm_version()),
        "model": str(run.model),
        "options": run.options.model_dump(),
        "seconds": round(run.seconds, 1),
        "workers": {
            name: {"classes": side.classes(), "ops": side.ops(), "layers": side.layers}
            for name, side in run.sides.items()
        },
        "mean_score": {side: sum(run.scores(side)) / len(run.rows) for side in run.sides},
        "ms_per_token_at_longest": {side: run.ms_per_token(side) for side in run.sides},
        "questions": [_row_as_json(row) for row in run.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    example = row.example
    return {
        "task": example.task,
        "seed": example.seed,
        "depth": example.depth,
        "n_prompt_tokens": row.context_len - 1,
        "answer": example.answer,
        "tokens_read": {"sparq": row.n_read, "dense": row.context_len},
        **{
            side: {**asdict(answer), "score": tasks.score(example, answer.text)}
            for side, answer in (("sparq", row.sparq), ("dense", row.dense))
        },
    }
