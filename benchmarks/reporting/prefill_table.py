"""The table of `bench ops --op prefill`: a chunk of a prompt, on every instruction set that it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_sparq.benchmarks.ops.prefill import CHUNK, CONTEXTS, METHODS
from vllm_sparq.benchmarks.reporting.methods_table import LAYER
from vllm_sparq.ops.instruction_sets import INSTRUCTION_SETS

Record = Mapping[str, Any]

TITLES = {"dense": "our op", **{name: f"`{name}`" for name in METHODS if name not in ("vllm", "dense")}}


def prefill_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per format, a column per instruction set and context; the newest clean run of each.

    A cell is the speed by vLLM's op of that run, and the share of the peak.
    """
    found = [r for r in records if r.get("bench") == "ops_prefill" and r["chunk"] == CHUNK]
    newest = {(r["isa"], r["context"], r["method"]): r for r in found if all(r[key] == LAYER[key] for key in LAYER)}
    columns = [(isa, c) for isa in INSTRUCTION_SETS for c in CONTEXTS if (isa, c, "vllm") in newest]
    heads = [f"{INSTRUCTION_SETS[isa].label}: {c:,}" if c == CONTEXTS[0] else f"{c:,}" for isa, c in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    times = [f"{newest[isa, c, 'vllm']['median_us'] / 1e3:,.0f} ms" for isa, c in columns]
    lines.append(f"| vLLM (CPU_ATTN) | {' | '.join(times)} |")
    for method, title in TITLES.items():
        measured = [newest.get((isa, c, method)) for isa, c in columns]
        if not any(measured):
            continue
        cells = ["" if r is None else f"{r['speedup_vs_vllm']:.2f}x, {r['share_of_bound']:.0%}" for r in measured]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines
