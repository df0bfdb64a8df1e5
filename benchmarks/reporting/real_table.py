"""The tables of docs/results.md on real models: text, beside dense, by context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

METHODS = {
    "sparq 1/2": "`sparq`, compression 2",
    "sparq 1/4": "`sparq`, compression 4",
    "sparq 1/8": "`sparq`, compression 8 (default)",
    'sparq 1/8 {"group_reduce": "probs"}': "`sparq`, compression 8, `group_reduce` `probs`",
    'sparq 1/8 {"r": 64}': "`sparq`, compression 8, r = 64",
    "quest 1/8": "`quest`, compression 8",
    "infllm 1/8": "`infllm`, compression 8",
    "h2o 1/8": "`h2o`, budget 1/8",
    "streaming 1/8": "`streaming`, budget 1/8",
    "int8": "`int8`",
    "k8v4": "`k8v4`",
    "int4": "`int4`",
    "kivi4": "`kivi4`",
    "k4v2": "`k4v2`",
    "kivi2": "`kivi2`",
    "sparq+k8v4 1/8": "SparQ over `k8v4`, 8",
    "sparq+int4 1/8": "SparQ over `int4`, 8",
    "sparq+kivi4 1/8": "SparQ over `kivi4`, 8",
    "sparq+k4v2 1/8": "SparQ over `k4v2`, 8",
    "frequency 1/8": "`frequency` (a shorter prompt), 8",
}
"""Name in the records -> in the table."""


def real_rows(records: Sequence[Record], *, model: str, lengths: Sequence[int]) -> list[str]:
    """Markdown: bits per byte and KL divergence of a model beside dense, the newest of each method and length."""
    newest = {
        (record["method"], record["length"]): record
        for record in records
        if record.get("bench") == "quality" and record.get("model") == model and record.get("task") == "text"
    }
    titles = [f"{length:,}: bits per byte | KL | top changed" for length in lengths]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (1 + 3 * len(lengths)) + "|"]
    for method, name in METHODS.items():
        cells = [_cells(newest.get((method, length))) for length in lengths]
        if any(cell.strip(" |") for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cells(record: Record | None) -> str:
    if record is None or "kl" not in record:
        return " | | "
    ends = f"{record['difference_low']:+.4f}..{record['difference_high']:+.4f}"
    return f"{record['difference']:+.4f} ({ends}) | {record['kl']:.4f} | {record['changed']:.1f}%"
