"""Tables of `bench ops` on other instruction sets than that of the first table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_sparq.benchmarks.reporting.methods_table import LAYER
from vllm_sparq.ops.instruction_sets import INSTRUCTION_SETS

Record = Mapping[str, Any]

LESSER, AMX = ("avx2", "avx512"), ("amx",)
"""Sets of one table, in its order: each table is of one machine."""

PAPER = {"r": 32, "k": 128}
"""SparQ as in its paper's benchmarks: as many tokens of every context."""


def isa_rows(records: Sequence[Record], names: Mapping[str, str], sets: Sequence[str] = LESSER) -> list[str]:
    """Markdown: a line per method, a column per instruction set and context; the newest clean run of each.

    A cell is the speed by vLLM's op of that run, which its own library for the instruction set computes.

    Args:
        names: in the table -> of the method.
        sets: the instruction sets that have columns, in their order.
    """
    found = [r for r in records if r.get("bench") == "ops" and r["isa"] in sets and r.items() >= PAPER.items()]
    newest = {(r["isa"], r["context"], r["method"]): r for r in found if all(r[key] == LAYER[key] for key in LAYER)}
    columns = sorted({(isa, c) for isa, c, _ in newest}, key=lambda column: (sets.index(column[0]), column[1]))
    first = {isa: min(c for other, c in columns if other == isa) for isa, _ in columns}
    heads = [f"{INSTRUCTION_SETS[isa].label}: {c:,}" if c == first[isa] else f"{c:,}" for isa, c in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    times = [f"{newest[isa, c, 'vllm']['median_us'] / 1e3:.2f} ms" for isa, c in columns]
    lines.append(f"| vLLM (CPU_ATTN) | {' | '.join(times)} |")
    for name, method in names.items():
        measured = [newest.get((isa, c, method)) for isa, c in columns]
        if any(measured):
            cells = ["" if r is None else f"{r['speedup_vs_vllm']:.1f}x" for r in measured]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
