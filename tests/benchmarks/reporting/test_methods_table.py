"""The README's table of methods: clean lines, ratios within one run, a dash where nothing is on record."""

from __future__ import annotations

from typing import Any

from vllm_sparq.backends import PRESETS
from vllm_sparq.benchmarks.reporting.methods_table import (
    ABSENT,
    BATCH,
    CONTEXT,
    LAYER,
    LENGTH,
    ROWS,
    TASKS,
    methods_rows,
)

SPARQ = next(row for row in ROWS if row.title == "`sparq`")


def engine(speed: float, **changed: Any) -> dict[str, Any]:
    case = {"bench": "engine", "method": SPARQ.engine, "context": CONTEXT, "batch": BATCH, "dirty": False}
    return {**case, "speedup_vs_vllm": speed, **changed}


def answers(method: str | None, held: float, commit: str = "a") -> list[dict[str, Any]]:
    case = {"bench": "quality", "method": method, "length": LENGTH, "dirty": False, "commit": commit}
    return [{**case, "task": task, "score": 99.6, "kv_bytes_held": held} for task in TASKS]


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Speed, memory and answers of the line of SparQ."""
    line = next(line for line in methods_rows(records) if line.startswith(f"| {SPARQ.title}"))
    return [cell.strip() for cell in line.split("|")[2:5]]


def test_a_line_per_preset() -> None:
    assert {row.title.strip("`") for row in ROWS} - {"vLLM, dense"} == set(PRESETS)
    assert len(methods_rows([])) == len(ROWS) + 2


def test_the_newest_clean_line_counts() -> None:
    op = {"bench": "ops", "method": SPARQ.op, "context": CONTEXT, **LAYER, "dirty": False, "compression": 8.0}
    fixed = {**op, "compression": None, "speedup_vs_vllm": 90.0}
    records = [engine(2.0), engine(3.04), engine(9.0, dirty=True), engine(8.0, batch=1)]
    records += [{**op, "speedup_vs_vllm": 20.0}, fixed]
    assert cells(records) == ["3.0x, 20.0x", ABSENT, ABSENT]


def test_answers_beside_dense_of_the_same_commit() -> None:
    dense, ours = answers("dense", 200.0), answers(SPARQ.answers, 226.0)
    assert cells([*dense, *ours]) == [f"{ABSENT}, {ABSENT}", "1.13", "100, 100, 100"]
    assert cells([*dense, *answers(SPARQ.answers, 226.0, commit="b")])[1:] == [ABSENT, ABSENT]
