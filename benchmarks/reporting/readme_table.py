"""The tables of the README and of docs/results.md that are made of this project's own results.

Each stands between two comments, ``<!-- engine -->`` and ``<!-- /engine -->``. The command
`python -m vllm_sparq.benchmarks.reporting.readme_table` writes them anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.reporting.methods_table import LAYER, methods_rows

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]

Record = Mapping[str, Any]

SPARQ = 'sparq {"r": 16, "k": 128}'
BESIDE = {"SparQ over `int4`": "sparq+int4", "`kivi4`, dense": "kivi", "H2O, 1,024 tokens": "h2o"}
"""Column -> method, in the table of `bench engine`."""


OPS = {
    "dense": "our dense op",
    "int8": "`int8`",
    "int4": "`int4`",
    "kivi4": "`kivi4`",
    "kivi2": "`kivi2`",
    "sparq": "SparQ",
    "sparq+int8": "SparQ over `int8`",
    "sparq+int4": "SparQ over `int4`",
    "sparq+kivi4": "SparQ over `kivi4`",
    "sparq+kivi2": "SparQ over `kivi2`",
}
"""Method of `bench ops` -> its name in the table."""


def ops_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per method, a column per context; the newest clean run of each."""
    found = [r for r in records if r.get("bench") == "ops" and not r["dirty"]]
    newest = {(r["method"], r["context"]): r for r in found if all(r[key] == LAYER[key] for key in LAYER)}
    contexts = sorted({context for _, context in newest})
    last = contexts[-1]
    lines = [
        f"| | {' | '.join(f'{c:,}' for c in contexts)} | GB/s at {last // 1024}k |",
        "|---" * (len(contexts) + 2) + "|",
    ]
    vllm = [newest["vllm", c] for c in contexts]
    times = [f"{r['median_us'] / 1e3:.2f} ms" for r in vllm]
    lines.append(f"| vLLM (CPU_ATTN) | {' | '.join(times)} | {vllm[-1]['gb_per_s']:.0f} |")
    for method, name in OPS.items():
        speeds = [f"{newest[method, c]['speedup_vs_vllm']:.1f}x" for c in contexts]
        lines.append(f"| {name} | {' | '.join(speeds)} | {newest[method, last]['gb_per_s']:.0f} |")
    return lines


def engine_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per context and batch that SparQ was measured at, the newest run of each."""
    found = [r for r in records if r.get("bench") == "engine"]
    newest = {(r["context"], r["batch"], r["method"]): r for r in found}
    names = ["context", "batch", "vLLM", "SparQ", "share of the bound", *BESIDE, "bound"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for context, batch, method in sorted(newest):
        if method != SPARQ:
            continue
        sparq = newest[context, batch, SPARQ]
        dense_ms = sparq["median_tpot_ms"] * sparq["speedup_vs_vllm"]
        cells = [f"{context // 1024}k", str(batch), f"{dense_ms:.1f} ms"]
        cells += [f"{sparq['median_tpot_ms']:.1f} ms, {_times(sparq['speedup_vs_vllm'])}"]
        cells += [f"{sparq['share_of_bound']:.0%}"]
        for other in BESIDE.values():
            one = newest.get((context, batch, other))
            cells.append("" if one is None else _beside(one, sparq))
        lines.append(f"| {' | '.join([*cells, _factor(sparq['amdahl_bound'])])} |")
    return lines


def _beside(one: Record, sparq: Record) -> str:
    """A method's speed, and the bound of its run where that is another run than SparQ's."""
    elsewhere = one["amdahl_bound"] != sparq["amdahl_bound"]
    return _factor(one["speedup_vs_vllm"]) + (f" (of {_factor(one['amdahl_bound'])})" if elsewhere else "")


def pressure_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per engine of the trace that overfills the pool, the newest of each."""
    newest = {r["method"]: r for r in records if r.get("bench") == "pressure" and r["output_len"] == 700}
    lines = [
        "| | requests/s | p99 time per output token | p99 time to first token | preempted |",
        "|---|---|---|---|---|",
    ]
    best = max(r["request_throughput"] for r in newest.values())
    for method, r in newest.items():
        rate = f"{r['request_throughput']:.2f}"
        cells = [method, f"**{rate}**" if r["request_throughput"] == best else rate]
        cells += [f"{r['p99_tpot_ms']:.1f} ms", f"{r['p99_ttft_ms'] / 1e3:.1f} s", f"{r['preemptions']} times"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: throughput of whole requests in the same memory, a line per method, a column per workload."""
    found = [r for r in records if r.get("bench") == "requests" and r["command"] == "throughput"]
    case = ("model", "input_len", "output_len", "num_prompts", "kv_cache_bytes")
    cases = list(dict.fromkeys(tuple(r[name] for name in case) for r in found))
    newest = {(tuple(r[name] for name in case), r["method"]): r for r in found}
    titles = [f"{prompt:,} + {answer:,} tokens, {n} requests, {size >> 20} MiB" for _, prompt, answer, n, size in cases]
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(cases) + 1)]
    for method in dict.fromkeys(r["method"] for r in found):
        cells = []
        for one in cases:
            r, dense = newest.get((one, method)), newest[one, DENSE]
            if r is None:
                cells.append("")
                continue
            rate, at_a_time = r["tokens_per_second"], r["sparq"]["max_concurrency"]
            speed = "" if method == DENSE else f", {_times(rate / dense['tokens_per_second'])}"
            cells.append(f"{rate:,.0f} tokens/s{speed}; {at_a_time:.1f} at a time")
        lines.append(f"| {'vLLM' if method == DENSE else f'`{method}`'} | {' | '.join(cells)} |")
    return lines


def quality_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: scores with their intervals, a line per method, dense first; bytes are means over the tasks."""
    found = {(r["method"], r["task"]): r for r in records if r.get("bench") == "quality" and r["length"] == 1024}
    tasks = list(dict.fromkeys(task for _, task in found))
    lines = [f"| | bytes read / kept | {' | '.join(tasks)} |", "|" + "---|" * (len(tasks) + 2)]
    for method in dict.fromkeys(method for method, _ in found):
        mine = [found[method, task] for task in tasks]
        shares = [
            fmean(r[field] / found[DENSE, task][field] for r, task in zip(mine, tasks, strict=True))
            for field in ("kv_bytes_moved", "kv_bytes_held")
        ]
        scores = [_with_interval(r) for r in mine]
        lines.append(f"| {method} | {shares[0]:.2f} / {shares[1]:.2f} | {' | '.join(scores)} |")
    return lines


def _with_interval(record: Record) -> str:
    score, low, high = (round(record[name]) for name in ("score", "low", "high"))
    return f"{score}" if low == high else f"{score} ({low}..{high})"


def _factor(speed: float) -> str:
    return f"{speed:.2f}x"


def _times(speed: float) -> str:
    return f"**{_factor(speed)}**" if speed >= 1 else f"{_factor(speed)} (slower than dense)"


TABLES: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "methods": methods_rows,
    "ops": ops_rows,
    "engine": engine_rows,
    "pressure": pressure_rows,
    "memory": memory_rows,
    "quality": quality_rows,
}
"""Name in a document's comments -> how the table is made."""

DOCUMENTS = {
    ROOT / "README.md": ("methods",),
    ROOT / "docs" / "results.md": ("ops", "engine", "pressure", "memory", "quality"),
}
"""Document -> its tables."""


def filled(text: str, names: Sequence[str], records: Sequence[Record]) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: there is no place for one of them.
    """
    for name in names:
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"there is no place for the table {name!r}: add <!-- {name} --> and <!-- /{name} -->")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = before + begin + "\n".join(TABLES[name](records)) + "\n" + end + after
    return text


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    records = read_records(RESULTS)
    for path, names in DOCUMENTS.items():
        path.write_text(filled(path.read_text(encoding="utf-8"), names, records), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {', '.join(names)}")


if __name__ == "__main__":
    main()
