"""The tables of a report: records of one kind as a heading and rows of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.proof import speed_note
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import SKIPPED
from vllm_sparq.benchmarks.reporting.settings import ALIKE, dense_of

Record = dict[str, Any]
Row = Sequence[str]
Rows = tuple[Row, Sequence[Row]]


def beside_dense(record: Record, records: Sequence[Record], value: str) -> str:
    """The ``value`` of a record beside that of dense where all that was asked, code and machine agree; else empty."""
    dense = dense_of(record, records)
    return "" if dense is None else speed_note(record[value] / dense[value])


def machine(record: Record) -> Row:
    """Cells of `ON`."""
    return str(record.get("gpu") or record.get("cpu") or ""), str(record.get("isa") or ""), shown(record, "threads")


ON = ("machine", "instructions", "threads")


def shown(record: Record, name: str) -> str:
    """A number or a name, or nothing where the record has none."""
    value = record.get(name)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def ops_table(records: Sequence[Record]) -> Rows:
    """A row per machine, shape, batch, context and method."""
    what = (*ON, "heads", "batch", "type", "compression", "r", "k", "context", "method", "block")
    head = (*what, "µs", "GB/s", "of memory", "times vLLM's op", "times our dense op")
    rows = [
        (
            *machine(r),
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}",
            f"{r['batch']}",
            *(shown(r, name) for name in ("dtype", "compression", "r", "k")),
            f"{r['context']:,}",
            r["method"],
            f"{r.get('block_size') or ''}",
            f"{r['median_us']:,.1f}",
            f"{r['gb_per_s']:.1f}",
            f"{r['gb_per_s'] / r['bandwidth_gb_per_s']:.0%}",
            "" if r.get("speedup_vs_vllm") is None else f"{r['speedup_vs_vllm']:.2f}x",
            "" if r.get("speedup_vs_dense") is None else speed_note(r["speedup_vs_dense"]),
        )
        for r in records
    ]
    return head, rows


def prefill_table(records: Sequence[Record]) -> Rows:
    """A row per machine, shape, tokens before, chunk and method."""
    head = (*ON, "heads", "batch", "before", "chunk", "method", "ms", "of the peak", "times vLLM's op")
    rows = [
        (
            *machine(r),
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}",
            f"{r['batch']}",
            f"{r['context']:,}",
            f"{r['chunk']:,}",
            r["method"],
            f"{r['median_us'] / 1e3:,.1f}",
            f"{r['share_of_bound']:.0%}",
            "" if r.get("speedup_vs_vllm") is None else f"{r['speedup_vs_vllm']:.2f}x",
        )
        for r in records
    ]
    return head, rows


def engine_table(records: Sequence[Record]) -> Rows:
    """A row per context, batch and method, with the fitted line of each batch and method."""
    from vllm_sparq.benchmarks.reporting.plots import break_even, fitted

    head = (*ON, "model", "context", "batch", "method", "block", "ms per token", "beside dense", "of the bound")
    rows = []
    for r in sorted(records, key=lambda r: (r["model"], r["batch"], r["context"])):
        case = [r.get(name) for name in ("batch", *ALIKE["engine"])]
        alike = [o for o in records if [o.get(name) for name in ("batch", *ALIKE["engine"])] == case]
        mine = fitted([o for o in alike if o["method"] == r["method"]])
        dense = fitted([o for o in alike if o["method"] == DENSE])
        even = break_even(mine, dense) if mine and dense and r["method"] not in (DENSE, SKIPPED) else None
        rows.append(
            (
                *machine(r),
                r["model"],
                f"{r['context']:,}",
                f"{r['batch']}",
                r["method"],
                f"{r.get('block_size') or ''}",
                f"{r['median_tpot_ms']:.1f}",
                "" if r["method"] == SKIPPED else speed_note(r["speedup_vs_vllm"]),
                f"{r['share_of_bound']:.0%}",
                ("" if mine is None else f"{1024 * mine[0]:.2f}")
                + ("" if even is None else f", breaks even at {even:,.0f}"),
                f"{r['kv_capacity_tokens']:,}" if r.get("kv_capacity_tokens") else "",
                r.get("attention", ""),
            )
        )
    return (*head, "ms per 1k tokens", "KV cache, tokens", "attention that ran"), rows


def serve_table(records: Sequence[Record]) -> Rows:
    """A row per rate, requests and method."""
    head = (
        *ON,
        "model",
        "requests",
        "tokens",
        "requests/s",
        "method",
        "output tokens/s",
        "beside dense",
        "TTFT ms",
        "TPOT ms",
        "p99 ITL ms",
    )
    rows = []
    for r in records:
        rows.append(
            (
                *machine(r),
                r["model"],
                shown(r, "num_prompts"),
                " + ".join(filter(None, (shown(r, "input_len"), shown(r, "output_len")))),
                f"{r['rate']}",
                r["method"],
                f"{r['output_throughput']:,.1f}",
                beside_dense(r, records, "output_throughput"),
                f"{r['mean_ttft_ms']:,.0f}",
                f"{r['mean_tpot_ms']:,.1f}",
                f"{r['p99_itl_ms']:,.1f}",
                f"{r['sparq']['kv_capacity_tokens']:,}",
                f"{r['sparq']['max_concurrency']:.1f}",
                f"{r['sparq']['preemptions']}",
                r["sparq"]["attention"],
            )
        )
    return (*head, "KV cache, tokens", "longest requests at a time", "preemptions", "attention that ran"), rows


def ray_table(records: Sequence[Record]) -> Rows:
    """A row per pool and method."""
    head = ("model", "replicas", "runner", "method", "rows", "output tokens/s", "beside dense", "rows per replica")
    rows = []
    for r in records:
        rows.append(
            (
                r["model"],
                f"{r['replicas']}",
                r["runner"],
                r["method"],
                f"{r['rows']:,}",
                f"{r['output_tokens_per_second']:,.1f}",
                beside_dense(r, records, "output_tokens_per_second"),
                " + ".join(str(one["rows"]) for one in r["per_replica"].values()),
                r["attention"],
            )
        )
    return (*head, "attention that ran"), rows


def quality_table(records: Sequence[Record]) -> Rows:
    """A row per model, task, length and method; scores of 100, or what is measured in its own unit."""
    head = (
        "model",
        "type",
        "text",
        "task",
        "tokens",
        "method",
        "prompts",
        "score",
        "95% interval",
        "beside dense",
        "its interval",
    )
    rows = []
    for r in records:
        length, score = r.get("length", r.get("context")), r.get("score")
        scale = 1 if "metric" in r else 100  # lines of the first version hold shares
        places = 3 if r.get("lower_is_better") else 1
        rows.append(
            (
                shown(r, "model"),
                shown(r, "dtype"),
                shown(r, "text"),
                r["task"],
                "" if length is None else f"{length:,}",
                r["method"],
                f"{r['n']}",
                "" if score is None else f"{scale * score:.{places}f}",
                f"{r['low']:.{places}f} .. {r['high']:.{places}f}" if "low" in r else "",
                *differences(r, places),
                f"{r['output_tokens']:.1f}" if "output_tokens" in r else "",
                f"{r['kv_bytes_moved']:,.0f}" if "kv_bytes_moved" in r else "",
                f"{r['kv_bytes_held']:,.1f}" if "kv_bytes_held" in r else "",
            )
        )
    return (*head, "tokens of an answer", "bytes read per token", "bytes kept per token"), rows


def differences(record: Record, places: int) -> Row:
    """From dense on the same prompts, and its interval; empty where there is none."""
    if record.get("difference") is None:
        return "", ""
    low, high = record["difference_low"], record["difference_high"]
    return f"{record['difference']:+.{places}f}", f"{low:+.{places}f} .. {high:+.{places}f}"


def requests_table(records: Sequence[Record]) -> Rows:
    """A row per case and method."""
    rows = [requests_bench.columns(r, dense_of(r, records)) for r in records]
    cells = [(*machine(r), r["model"], *row.values()) for r, row in zip(records, rows, strict=True)]
    return (*ON, "model", *rows[0]), cells


def pressure_table(records: Sequence[Record]) -> Rows:
    """A row per trace and method."""
    head = (
        "model",
        "requests",
        "MB of KV cache",
        "engine",
        "method",
        "requests/s",
        "beside dense",
        "p99 TTFT ms",
        "p99 TPOT ms",
    )
    rows = [
        (
            r["model"],
            f"{r['n']} of about {r['prompt_len']:,} + {r['output_len']:,} tokens, {r['rate']:g} a second",
            f"{r['pool']:g}",
            json.dumps(r.get("engine_args") or {}),
            r["method"],
            f"{r['request_throughput']:.2f}",
            beside_dense(r, records, "request_throughput"),
            f"{r['p99_ttft_ms']:,.0f}",
            f"{r['p99_tpot_ms']:,.1f}",
            f"{r['kv_capacity_tokens']:,}",
            f"{r['preemptions']}",
            r["attention"],
        )
        for r in records
    ]
    return (*head, "KV cache, tokens", "preemptions", "attention that ran"), rows
