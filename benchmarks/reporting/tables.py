"""The tables of a report: records of one kind as a heading and rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.proof import speed_note
from vllm_sparq.benchmarks.common.records import dense_beside
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import SKIPPED

Record = dict[str, Any]
Row = Sequence[str]
Rows = tuple[Row, Sequence[Row]]


def beside_dense(record: Record, records: Sequence[Record], case: Sequence[str], value: str) -> str:
    """The ``value`` of a record beside that of dense where all fields of the ``case``, code and machine agree; else
    empty."""
    dense = dense_beside(record, records, case)
    return "" if dense is None else speed_note(record[value] / dense[value])


def ops_table(records: Sequence[Record]) -> Rows:
    """A row per shape, batch, context and method."""
    what, speed = ("heads", "batch", "context", "method", "block"), ("µs", "GB/s", "of memory")
    head = (*what, *speed, "times vLLM's op", "times our dense op")
    rows = [
        (
            f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}",
            f"{r['batch']}",
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
    """A row per shape, tokens before, chunk and method."""
    head = ("heads", "batch", "before", "chunk", "method", "ms", "of the peak", "times vLLM's op")
    rows = [
        (
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

    head = ("model", "context", "batch", "method", "block", "ms per token", "beside dense", "of the bound")
    rows = []
    for r in sorted(records, key=lambda r: (r["model"], r["batch"], r["context"])):
        alike = [o for o in records if (o["batch"], o["model"]) == (r["batch"], r["model"])]
        mine = fitted([o for o in alike if o["method"] == r["method"]])
        dense = fitted([o for o in alike if o["method"] == DENSE])
        even = break_even(mine, dense) if mine and dense and r["method"] not in (DENSE, SKIPPED) else None
        rows.append(
            (
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
    """A row per rate and method."""
    head = ("model", "requests/s", "method", "output tokens/s", "beside dense", "TTFT ms", "TPOT ms", "p99 ITL ms")
    rows = []
    for r in records:
        rows.append(
            (
                r["model"],
                f"{r['rate']}",
                r["method"],
                f"{r['output_throughput']:,.1f}",
                beside_dense(r, records, ("model", "rate", "input_len", "output_len"), "output_throughput"),
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
                beside_dense(r, records, ("model", "replicas", "runner", "rows"), "output_tokens_per_second"),
                " + ".join(str(one["rows"]) for one in r["per_replica"].values()),
                r["attention"],
            )
        )
    return (*head, "attention that ran"), rows


def quality_table(records: Sequence[Record]) -> Rows:
    """A row per task, length and method."""
    head = ("task", "tokens", "method", "prompts", "score", "95% interval", "beside dense", "its interval")
    rows = []
    for r in records:
        length, score = r.get("length", r.get("context")), r.get("score")
        scale = 1 if "metric" in r else 100  # lines of the first version hold shares
        rows.append(
            (
                r["task"],
                "" if length is None else f"{length:,}",
                r["method"],
                f"{r['n']}",
                "" if score is None else f"{scale * score:.1f}",
                f"{r['low']:.1f} .. {r['high']:.1f}" if "low" in r else "",
                f"{r['difference']:+.1f}" if r.get("difference") is not None else "",
                f"{r['difference_low']:+.1f} .. {r['difference_high']:+.1f}" if r.get("difference") is not None else "",
                f"{r['output_tokens']:.1f}" if "output_tokens" in r else "",
                f"{r['kv_bytes_moved']:,.0f}" if "kv_bytes_moved" in r else "",
                f"{r['kv_bytes_held']:,.1f}" if "kv_bytes_held" in r else "",
            )
        )
    return (*head, "tokens of an answer", "bytes read per token", "bytes kept per token"), rows


def requests_table(records: Sequence[Record]) -> Rows:
    """A row per case and method."""
    rows = [requests_bench.columns(r, requests_bench.dense_of(r, records)) for r in records]
    return ("model", *rows[0]), [(r["model"], *row.values()) for r, row in zip(records, rows, strict=True)]


def pressure_table(records: Sequence[Record]) -> Rows:
    """A row per trace and method."""
    head = ("model", "requests", "MB of KV cache", "method", "requests/s", "beside dense", "p99 TTFT ms", "p99 TPOT ms")
    case = ("model", "n", "rate", "prompt_len", "output_len", "pool", "seed")
    rows = [
        (
            r["model"],
            f"{r['n']} of about {r['prompt_len']:,} + {r['output_len']:,} tokens, {r['rate']:g} a second",
            f"{r['pool']:g}",
            r["method"],
            f"{r['request_throughput']:.2f}",
            beside_dense(r, records, case, "request_throughput"),
            f"{r['p99_ttft_ms']:,.0f}",
            f"{r['p99_tpot_ms']:,.1f}",
            f"{r['kv_capacity_tokens']:,}",
            f"{r['preemptions']}",
            r["attention"],
        )
        for r in records
    ]
    return (*head, "KV cache, tokens", "preemptions", "attention that ran"), rows
