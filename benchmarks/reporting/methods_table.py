"""The README's table of methods: what each gains and what it costs, from this project's own results.

Speed is from `bench engine` and `bench ops`, memory and answers are from `eval`. Only lines of a clean tree count, and
every ratio is within one run: what a record says of the dense engine that took turns with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm_sparq.benchmarks.common.records import dense_beside
from vllm_sparq.config import Options

Record = Mapping[str, Any]

CONTEXT, BATCH = 65536, 8
"""Tokens and requests of the speeds that are shown."""

LAYER = {"heads": 32, "kv_heads": 8, "batch": 1}
"""The attention layer whose op is shown."""

LENGTH = 1024
"""Prompt tokens of the answers that are shown."""

TASKS = ("needle", "recall", "repetition")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        title: what the user selects.
        idea: in a few words.
        paper: arXiv number; empty for dense.
        where: the files that implement it, links for the README.
        engine, op, answers: the method's name in records of `bench engine`, `bench ops` and `eval`.
    """

    title: str
    idea: str
    paper: str = ""
    where: tuple[str, ...] = ()
    engine: str | None = None
    op: str | None = None
    answers: str | None = None


ROWS = (
    Row(title="vLLM, dense", idea="", engine="dense", op="vllm", answers="dense"),
    Row(
        title="`sparq`",
        idea="read best tokens, 1/8",
        paper="2312.04985",
        where=("vllm_sparq/ops/sparq_decode",),
        engine="sparq",
        op="sparq",
        answers="sparq 1/8",
    ),
    Row(
        title="`quest`",
        idea="read best spans, 1/8",
        paper="2406.10774",
        where=("vllm_sparq/ops/quest_decode",),
        engine="quest",
        op="quest",
        answers="quest 1/8",
    ),
    Row(
        title="`flexgen`",
        idea="4-bit blocks",
        paper="2303.06865",
        where=("vllm_sparq/ops/codec.py",),
        engine="flexgen",
        op="int4",
        answers="int4",
    ),
    Row(
        title="`kivi`",
        idea="4-bit blocks, K by channel",
        paper="2402.02750",
        where=("vllm_sparq/ops/codec.py",),
        engine="kivi",
        op="kivi4",
        answers="kivi4",
    ),
    Row(
        title="`h2o`",
        idea="keep most attended, 1/2",
        paper="2306.14048",
        where=("vllm_sparq/ops/evict",),
        engine="h2o",
        op="h2o",
        answers="h2o 1/2",
    ),
    Row(
        title="`streaming`",
        idea="keep first and newest, 1/2",
        paper="2309.17453",
        where=("vllm_sparq/ops/evict",),
        engine="streaming",
        op="streaming",
        answers="streaming 1/2",
    ),
)
"""The presets of `--attention-backend`, in the order of the table."""

ABSENT = "–"
"""Where nothing is on record."""


def methods_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per method, dense first."""
    clean = [record for record in records if not record.get("dirty")]
    names = ["method", "speed", "memory", f"{', '.join(TASKS)}", "paper", "code"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in ROWS:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else ""
        files = ", ".join(f"[{path.rpartition('/')[2]}]({path})" for path in row.where)
        title = f"{row.title}: {row.idea}" if row.idea else row.title
        cells = [title, speed(row, clean), *memory_and_answers(row, clean), paper, files]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed(row: Row, records: Sequence[Record]) -> str:
    """Times vLLM's speed: per output token through the engine, and of the attention op alone; newest run of each."""
    token = newest(records, bench="engine", method=row.engine, context=CONTEXT, batch=BATCH)
    op = newest(records, bench="ops", method=row.op, context=CONTEXT, compression=Options().compression, **LAYER)
    return ", ".join(ABSENT if found is None else f"{found['speedup_vs_vllm']:.1f}x" for found in (token, op))


def memory_and_answers(row: Row, records: Sequence[Record]) -> tuple[str, str]:
    """Bytes of KV cache kept, dense = 1, and the scores of 100."""
    scores, held = [], []
    for task in TASKS:
        found = newest(records, bench="quality", method=row.answers, task=task, length=LENGTH)
        dense = dense_beside(found, records) if found else None
        if found is None or dense is None:
            return ABSENT, ABSENT
        scores.append(f"{found['score']:.0f}")
        held.append(found["kv_bytes_held"] / dense["kv_bytes_held"])
    return f"{fmean(held):.2f}", ", ".join(scores)


def newest(records: Sequence[Record], **case: Any) -> Record | None:
    """The last line that was written of a case; None where it was never measured."""
    found = [r for r in records if all(r.get(name) == value for name, value in case.items())]
    return found[-1] if found else None
