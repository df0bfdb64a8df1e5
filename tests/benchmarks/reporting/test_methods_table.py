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
    MEMORY,
    MODELS,
    ROWS,
    methods_rows,
)

SPARQ = next(row for row in ROWS if row.title == "`sparq`")


def engine(speed: float, **changed: Any) -> dict[str, Any]:
    case = {"bench": "engine", "method": SPARQ.engine, "context": CONTEXT, "batch": BATCH, "dirty": False}
    return {**case, "speedup_vs_vllm": speed, **changed}


def text(method: str | None, **measured: float) -> list[dict[str, Any]]:
    case = {"bench": "quality", "task": "text", "method": method, "length": LENGTH, "dirty": False}
    return [{**case, **measured, "model": model} for model in MODELS]


def bytes_held(method: str | None, held: float, commit: str = "a") -> dict[str, Any]:
    return {**MEMORY, "method": method, "kv_bytes_held": held, "commit": commit, "dirty": False}


def cells(records: list[dict[str, Any]]) -> list[str]:
    """Speed, memory and text of the line of SparQ."""
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


def test_memory_beside_dense_of_the_same_commit() -> None:
    assert cells([bytes_held("dense", 200.0), bytes_held(SPARQ.text, 226.0)])[1] == "1.13"
    assert cells([bytes_held("dense", 200.0), bytes_held(SPARQ.text, 226.0, commit="b")])[1] == ABSENT


def test_text_of_every_model() -> None:
    dense, ours = text("dense", score=1.1), text(SPARQ.text, score=1.2, difference=0.0136)
    assert cells([*dense, *ours])[2] == "+0.014, +0.014"
    assert cells([*dense, *ours[:1]])[2] == ABSENT
    assert methods_rows(dense)[2] == f"| vLLM, dense | {ABSENT}, {ABSENT} | {ABSENT} | 1.100, 1.100 |  |  |"
