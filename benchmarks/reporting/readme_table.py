"""The tables of the README and of docs/results.md that are made of this project's own results.

Each stands between two comments, ``<!-- engine -->`` and ``<!-- /engine -->``; `vllm-sparq report --documents` writes
them anew. No table sees a line of a tree with uncommitted changes, and no ratio is made of two lines of different code,
machines or instruction sets: a cell without its partner stays empty until it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE, preferred_block_size
from vllm_sparq.benchmarks.common.lines import replace_text
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.common.records import comparable, read_records
from vllm_sparq.benchmarks.engine.cases import N_TAIL, SKIPPED
from vllm_sparq.benchmarks.reporting.gpu_table import (
    gpu_check_rows,
    gpu_decode_rows,
    gpu_engine_rows,
    gpu_prefill_rows,
)
from vllm_sparq.benchmarks.reporting.isa_table import AMX, PAPER, isa_rows
from vllm_sparq.benchmarks.reporting.methods_table import LAYER, methods_rows
from vllm_sparq.benchmarks.reporting.prefill_table import prefill_rows
from vllm_sparq.benchmarks.reporting.real_table import real_rows
from vllm_sparq.benchmarks.reporting.runs import BUNDLED, SHAPE, case, dense_of, of_model
from vllm_sparq.config import Options
from vllm_sparq.console import UsageError

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]

Record = Mapping[str, Any]

SPARQ = 'sparq {"r": 16, "k": 128}'
SPARQ_8 = "sparq 1/8"
BESIDE = {
    "SparQ, 1/8": "sparq",
    "SparQ over `int4`": "sparq+int4",
    "`kivi4`, dense": "kivi",
    "H2O, 1,024 tokens": "h2o",
}
"""Column -> method, in the table of `bench engine`."""


LENGTH = 1024
TASKS = ("needle", "recall", "repetition", "map")
"""Of the answers: prompt tokens, and what is asked."""

CAPPED = '"positions": "capped"'
"""Among the options in a method's name: LM-Infinite's distances."""

BY_CONTEXT = ("needle", "recall", "repetition")
"""What is asked at several lengths."""

BLOCKS = {
    '`kivi2`, `"chunk": "exact"`': 'kivi2 {"chunk": "exact"}',
    "KIVI-4 as its paper defines it, simulated": "KIVI-4",
    "KIVI-2 as its paper defines it, simulated": "KIVI-2",
    "SparQ over `int8`, compression 8": "sparq+int8 1/8",
    "SparQ over `int4`, compression 8": "sparq+int4 1/8",
    "SparQ over `kivi4`, compression 8": "sparq+kivi4 1/8",
}
"""Its name in the table of quantized blocks -> method."""

COMPRESSION = Options().compression
"""Of every figure whose setting is not named."""

OPS_BLOCK_SIZES = (PREFERRED_BLOCK_SIZE, None)
"""Tokens per block in the table of `bench ops`; vLLM's own op has its best."""

OPS = {
    "our dense op": "dense",
    "`int8`": "int8",
    "`int4`": "int4",
    "`kivi4`": "kivi4",
    "`kivi2`": "kivi2",
    "SparQ": "sparq",
    "SparQ over `int8`": "sparq+int8",
    "SparQ over `int4`": "sparq+int4",
    "SparQ over `kivi4`": "sparq+kivi4",
    "SparQ over `kivi2`": "sparq+kivi2",
}
"""Its name in the table -> method of `bench ops`, with its defaults."""


def ops_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per method, a column per context; the newest clean run of each."""
    found = of_one_machine([r for r in records if r.get("bench") == "ops" and r["block_size"] in OPS_BLOCK_SIZES])
    of_layer = [r for r in found if all(r[key] == LAYER[key] for key in LAYER)]
    newest = {(r["method"], r["context"]): r for r in of_layer if r.get("compression") == COMPRESSION}
    paper = {r["context"]: r for r in of_layer if r["method"] == "sparq" and r.items() >= PAPER.items()}
    contexts = sorted({context for _, context in newest})
    last = contexts[-1]
    lines = [
        f"| | {' | '.join(f'{c:,}' for c in contexts)} | at {last // 1024}k: GB/s, of memory's |",
        "|---" * (len(contexts) + 2) + "|",
    ]
    vllm = [newest["vllm", c] for c in contexts]
    times = [f"{r['median_us'] / 1e3:.2f} ms" for r in vllm]
    lines.append(f"| vLLM (CPU_ATTN) | {' | '.join(times)} | {_rate(vllm[-1])} |")
    rows = {name: [newest[method, c] for c in contexts] for name, method in OPS.items()}
    rows["SparQ, r = 32, k = 128"] = [paper[c] for c in contexts]
    for name, measured in rows.items():
        speeds = [f"{r['speedup_vs_vllm']:.1f}x" for r in measured]
        lines.append(f"| {name} | {' | '.join(speeds)} | {_rate(measured[-1])} |")
    return lines


def _rate(record: Record) -> str:
    """Bytes a second, and which share that is of what the memory gave in the same run."""
    return f"{record['gb_per_s']:.0f}, {record['gb_per_s'] / record['bandwidth_gb_per_s']:.0%}"


def engine_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per context and batch that SparQ was measured at, the newest run of each.

    Blocks are what engines choose.
    """
    of_engines = [r for r in of_model(SHAPE, records) if r.get("bench") == "engine" and _of_chosen_blocks(r)]
    found = of_one_machine(of_engines)
    newest = {(r["context"], r["batch"], r["method"]): r for r in found}
    names = ["context", "batch", "vLLM", "SparQ, r = 16, k = 128", "share of the bound", *BESIDE, "bound"]
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


def _of_chosen_blocks(record: Record) -> bool:
    if record["method"] in (DENSE, SKIPPED):
        return True
    options = Method.named(record["method"].partition(" ")[0], record["options"]).parsed
    return bool(record["block_size"] == preferred_block_size(options, record["context"] + N_TAIL))


def _beside(one: Record, sparq: Record) -> str:
    """A method's speed, and the bound of its run where that is another run than SparQ's."""
    elsewhere = one["amdahl_bound"] != sparq["amdahl_bound"]
    return _factor(one["speedup_vs_vllm"]) + (f" (of {_factor(one['amdahl_bound'])})" if elsewhere else "")


def lossless_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per model, context and batch that an engine which drafts for itself was measured at."""
    of_engines = [r for r in records if r.get("bench") == "engine"]
    found = [r for r in of_one_machine(of_engines) if r["options"].get("lossless")]
    titles = ["model", "context", "batch", "vLLM", "`lossless`", "tokens a step", "drafts accepted, by position"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in {(r["model"], r["context"], r["batch"]): r for r in found}.values():
        accepted = " ".join(f"{share:.2f}" for share in r["acceptance"])
        cells = [r["model"], f"{r['context']:,}", str(r["batch"])]
        cells += [f"{r['median_tpot_ms'] * r['speedup_vs_vllm']:.1f} ms"]
        cells += [f"{r['median_tpot_ms']:.1f} ms, {_times(r['speedup_vs_vllm'])}"]
        lines.append(f"| {' | '.join([*cells, format(r['tokens_per_step'], '.2f'), accepted])} |")
    return lines


def mixed_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per context, batch and choices of what mixing these in a batch was measured to cost."""
    found = of_one_machine([r for r in records if r.get("bench") == "mixed"])
    titles = ["context", "batch", "a step of each choice alone", "mixed", "overhead, by turns"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for r in {(r["model"], r["context"], r["batch"], *r["choices"]): r for r in found}.values():
        times = dict(r["median_step_ms"])
        mixed = times.pop("mixed")
        cells = [f"{r['context']:,}", str(r["batch"]), ", ".join(f"`{name}` {ms:.1f} ms" for name, ms in times.items())]
        cells += [f"{mixed:.1f} ms", f"{r['overhead']:+.1%} ({r['least_overhead']:+.1%} .. {r['most_overhead']:+.1%})"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pressure_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: a line per engine of the newest run of the trace that overfills the pool."""
    found = [r for r in records if r.get("bench") == "pressure" and r["output_len"] == 700]
    newest = {r["method"]: r for r in found if comparable(r, found[-1]) and case(r) == case(found[-1])}
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
    found = of_one_machine([r for r in records if r.get("bench") == "requests" and r["command"] == "throughput"])
    names = ("model", "input_len", "output_len", "num_prompts", "kv_cache_bytes")
    cases = list(dict.fromkeys(tuple(r[name] for name in names) for r in found))
    newest = {(tuple(r[name] for name in names), r["method"]): r for r in found}
    titles = [f"{prompt:,} + {answer:,} tokens, {n} requests, {size >> 20} MiB" for _, prompt, answer, n, size in cases]
    lines = [f"| | {' | '.join(titles)} |", "|" + "---|" * (len(cases) + 1)]
    for method in dict.fromkeys(r["method"] for r in found):
        cells = []
        for one in cases:
            r = newest.get((one, method))
            if r is None:
                cells.append("")
                continue
            rate, at_a_time = r["tokens_per_second"], r["sparq"]["max_concurrency"]
            dense = dense_of(r, found)
            speed = f", {_times(rate / dense['tokens_per_second'])}" if dense and method != DENSE else ""
            cells.append(f"{rate:,.0f} tokens/s{speed}; {at_a_time:.1f} at a time")
        lines.append(f"| {'vLLM' if method == DENSE else f'`{method}`'} | {' | '.join(cells)} |")
    return lines


def quality_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: scores with their intervals, a line per method, dense first; bytes are means over the tasks."""
    toy = [r for r in of_model(BUNDLED, records) if r.get("bench") == "quality" and r["task"] in TASKS]
    found = {(r["method"], r["task"]): r for r in toy if r["length"] == LENGTH}
    lines = [f"| | bytes read / kept | {' | '.join(TASKS)} |", "|" + "---|" * (len(TASKS) + 2)]
    for method in dict.fromkeys(method for method, _ in found):
        title = _answering(method)
        if title is None or any((method, task) not in found for task in TASKS):
            continue  # stands in a table of its own, or is not measured yet
        mine = [found[method, task] for task in TASKS]
        pairs = [(r, dense) for r in mine if (dense := dense_of(r, records))]
        shares = [fmean(r[field] / dense[field] for r, dense in pairs) for field in ("kv_bytes_moved", "kv_bytes_held")]
        scores = [_with_interval(r) for r in mine]
        lines.append(f"| {title} | {shares[0]:.2f} / {shares[1]:.2f} | {' | '.join(scores)} |")
    return lines


def _answering(method: str) -> str | None:
    """What the table of answers calls a method; None where it stands in a table of its own."""
    plain, _, options = method.partition(" {")
    if not options:
        return None if "+" in method else plain
    return f"{plain}, capped (LM-Infinite)" if CAPPED in options else None


def contexts_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: dense and SparQ at 1/8, a line per task, a column per length; the newest of each."""
    of_sparq = [r for r in of_model(BUNDLED, records) if r.get("bench") == "quality" and r["method"] == SPARQ_8]
    found = {(r["task"], r["length"]): r for r in of_sparq if r["task"] in BY_CONTEXT}
    lengths = sorted({length for _, length in found})
    lines = [f"| task | {' | '.join(f'{n:,}' for n in lengths)} |", "|" + "---|" * (len(lengths) + 1)]
    for task in BY_CONTEXT:
        cells = []
        for length in lengths:
            one = found.get((task, length))
            dense = dense_of(one, records) if one else None
            cells.append("" if one is None or dense is None else f"{dense['score']:.1f} / {_with_difference(one)}")
        lines.append(f"| {task}, dense / SparQ | {' | '.join(cells)} |")
    return lines


def blocks_rows(records: Sequence[Record]) -> list[str]:
    """Markdown: what the table of answers does not hold of quantized blocks, scores by task; the newest of each."""
    benches = ("quality", "kivi_simulation")
    of_toy = [r for r in of_model(BUNDLED, records) if r.get("bench") in benches and r["length"] == LENGTH]
    found = {(r["method"], r["task"]): r for r in of_toy}
    lines = [f"| | {' | '.join(TASKS)} |", "|" + "---|" * (len(TASKS) + 1)]
    for name, method in BLOCKS.items():
        mine = [found.get((method, task)) for task in TASKS]
        lines.append(f"| {name} | {' | '.join('' if r is None else _with_difference(r) for r in mine)} |")
    return lines


def _with_difference(record: Record) -> str:
    """A score, and the 95% interval of its difference from dense, prompt by prompt, where that has a width."""
    low, high = record.get("difference_low", 0.0), record.get("difference_high", 0.0)
    return f"{record['score']:.1f}" + (f" ({low:+.1f}..{high:+.1f})" if low != high else "")


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
    "isa": partial(isa_rows, names=OPS),
    "amx": partial(isa_rows, names=OPS, sets=AMX),
    "prefill": prefill_rows,
    "engine": engine_rows,
    "lossless": lossless_rows,
    "mixed": mixed_rows,
    "pressure": pressure_rows,
    "memory": memory_rows,
    "quality": quality_rows,
    "contexts": contexts_rows,
    "blocks": blocks_rows,
    "real": partial(real_rows, model="smollm2-135m", lengths=(1024, 4096, 8000)),
    "gemma": partial(real_rows, model="gemma3-270m", lengths=(4096,)),
    "gpu-checks": gpu_check_rows,
    "gpu-decode": gpu_decode_rows,
    "gpu-prefill": gpu_prefill_rows,
    "gpu-engine": gpu_engine_rows,
}
"""Name in a document's comments -> how the table is made."""

DOCUMENTS = {
    ROOT / "README.md": ("methods",),
    ROOT / "docs" / "results.md": (
        "ops",
        "isa",
        "amx",
        "prefill",
        "engine",
        "lossless",
        "mixed",
        "pressure",
        "memory",
        "quality",
        "contexts",
        "blocks",
        "real",
        "gemma",
    ),
    ROOT / "docs" / "gpu.md": ("gpu-checks", "gpu-decode", "gpu-prefill", "gpu-engine"),
}
"""Document -> its tables."""


def clean(records: Sequence[Record]) -> list[Record]:
    """Without lines of trees with uncommitted changes, or that do not say."""
    return [record for record in records if record.get("dirty") is False]


def of_one_machine(records: Sequence[Record]) -> list[Record]:
    """Lines of the machine, and of the instruction set, that most of them are of."""
    machines = [tuple(r.get(name) for name in ("cpu", "isa", "gpu")) for r in records]
    most = max(machines, key=machines.count, default=None)
    return [r for r, machine in zip(records, machines, strict=True) if machine == most]


def filled(text: str, names: Sequence[str], records: Sequence[Record]) -> str:
    """A document with its tables made anew, of the clean lines.

    Raises:
        ValueError: there is no place for one of them.
    """
    records = clean(records)
    for name in names:
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"there is no place for the table {name!r}: add <!-- {name} --> and <!-- /{name} -->")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = before + begin + "\n".join(TABLES[name](records)) + "\n" + end + after
    return text


def write_tables() -> list[Path]:
    """Write the tables of every document anew; the documents.

    Raises:
        UsageError: this is no checkout, so that there are no documents.
    """
    missing = [path for path in DOCUMENTS if not path.is_file()]
    if missing:
        raise UsageError(f"{missing[0]}: there is no such document; --documents is for a checkout of vllm-sparq")
    records = read_records(RESULTS)
    for path, names in DOCUMENTS.items():
        replace_text(path, filled(path.read_text(encoding="utf-8"), names, records))
    return list(DOCUMENTS)
