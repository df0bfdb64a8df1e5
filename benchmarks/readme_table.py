"""Tables of the README, from this project's own results: `python -m vllm_sparq.benchmarks.readme_table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.engine_cases import SKIPPED
from vllm_sparq.benchmarks.methods import DENSE
from vllm_sparq.benchmarks.records import read_records
from vllm_sparq.benchmarks.report import newest

RESULTS = Path(__file__).parent / "results"


def engine_rows(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line per context and batch, a column per method, the bound beside them."""
    found = newest([dict(r) for r in records if r.get("bench") == "engine"])
    methods = [m for m in dict.fromkeys(r["method"] for r in found) if m not in (DENSE, SKIPPED)]
    lines = [f"| context | batch | {' | '.join(['vLLM', *(f'`{m}`' for m in methods), 'bound'])} |"]
    lines.append("|" + "---|" * (len(methods) + 4))
    cases = sorted({(r["batch"], r["context"], r["model"]) for r in found}, key=lambda case: (case[1], case[0]))
    for batch, context, model in cases:
        here = {r["method"]: r for r in found if (r["batch"], r["context"], r["model"]) == (batch, context, model)}
        cells = [f"{here[DENSE]['median_tpot_ms']:.1f} ms"]
        for method in methods:
            one = here.get(method)
            cells.append("" if one is None else f"{one['median_tpot_ms']:.1f} ms, {_times(one['speedup_vs_vllm'])}")
        cells.append(f"{here[DENSE]['amdahl_bound']:.2f}x")
        lines.append(f"| {context:,} | {batch} | {' | '.join(cells)} |")
    return lines


def _times(speed: float) -> str:
    return f"**{speed:.2f}x**" if speed >= 1 else f"{speed:.2f}x (slower)"


def main() -> None:
    """Print the tables."""
    print("\n".join(engine_rows(read_records(RESULTS))))


if __name__ == "__main__":
    main()
