"""The tables of a report: lines of one kind as a heading and rows of text.

Each kind says what its rows are called and what was found. What else tells the rows of a table apart gets a column of
its own, so that no two are called the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.proof import speed_note
from vllm_sparq.benchmarks.common.records import comparable
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import SKIPPED
from vllm_sparq.benchmarks.reporting.runs import (
    METHOD,
    commit_of,
    dense_of,
    differing,
    identity,
    names_apart,
    newest,
    settings,
    text_of,
    title_of,
)

Record = Mapping[str, Any]
Records = Sequence[Record]
Row = Sequence[str]
Cells = dict[str, str]

NO_DENSE = "no dense run of this case"
"""In place of a ratio."""

PLACES = {True: 3, False: 1}
"""Whether fewer are better (bits, where a hundredth says a lot; else points of 100) -> decimals."""


@dataclass(frozen=True)
class Kind:
    """What the rows of a kind hold.

    Attributes:
        called: the cells that say what was measured, but for model, machine and method.
        fields: those of a line that these cells show.
        found: the cells of a line's figures, among all lines of the kind.
        order: fields by which the rows are sorted; those that agree stay as they were measured.
    """

    called: Callable[[Record], Cells]
    fields: tuple[str, ...]
    found: Callable[[Record, Records], Cells]
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first ``n_called`` columns say what a row is of."""

    head: Row
    rows: Sequence[Row]
    n_called: int


def tabulate(kind: str, lines: Records, everything: Records, said: Collection[str] = ()) -> Table:
    """A row for each of the newest lines.

    Args:
        kind: of `KINDS`.
        lines: those of the table.
        everything: all lines of the kind, among which that of dense may be.
        said: fields that stand above the table and need no column.
    """
    about = KINDS[kind]
    lines = sorted(newest(lines), key=lambda r: [_rank(r.get(name)) for name in about.order])
    first = [name for name in names_apart(kind) if name not in said and any(r.get(name) for r in lines)]
    shown = {*first, *said, *about.fields, "bench", "method"}
    more = [name for name in differing(lines) if name not in shown]
    of_case = [name for name in more if name not in METHOD]
    called = [
        {
            **{title_of(name): text_of(r.get(name)) for name in first},
            **about.called(r),
            **{title_of(name): text_of(settings(r).get(name)) for name in of_case},
            "method": str(r["method"]),
        }
        for r in lines
    ]
    for name in _needed([name for name in more if name in METHOD], lines, called):
        for r, cells in zip(lines, called, strict=True):
            cells[title_of(name)] = text_of(settings(r).get(name))
    found = [{**about.found(r, everything), "commit": commit_of(r)} for r in lines]
    rows = [(*cells.values(), *figures.values()) for cells, figures in zip(called, found, strict=True)]
    return Table(head=(*called[0], *found[0]), rows=rows, n_called=len(called[0]))


def _needed(names: Sequence[str], lines: Records, called: Sequence[Cells]) -> list[str]:
    """Those of a method's settings in which rows differ that are called the same so far."""
    alike: dict[tuple[str, ...], list[Record]] = {}
    for line, cells in zip(lines, called, strict=True):
        alike.setdefault(tuple(cells.values()), []).append(line)
    needed = {name for same in alike.values() for name in differing(same)}
    return [name for name in names if name in needed]


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before names; what is absent comes last."""
    number = isinstance(value, int | float)
    return value is None, float(value) if number else 0.0, "" if number else str(value)


def beside_dense(record: Record, records: Records, value: str) -> str:
    """The ``value`` of a record beside that of dense for the same case, of the same code and machine."""
    dense = dense_of(record, records)
    return NO_DENSE if dense is None else speed_note(record[value] / dense[value])


def _layer(r: Record) -> Cells:
    return {"heads": f"{r['heads']}/{r['kv_heads']}/{r['head_dim']}", "batch": f"{r['batch']}"}


def _times(r: Record, name: str) -> str:
    return "" if r.get(name) is None else f"{r[name]:.2f}x"


def _ops_called(r: Record) -> Cells:
    known = settings(r)
    read = {name: text_of(known.get(name)) for name in ("compression", "r", "k")}
    return {**_layer(r), "context": f"{r['context']:,}", **read, "block": text_of(r.get("block_size"))}


def _ops_found(r: Record, _: Records) -> Cells:
    bandwidth = r.get("bandwidth_gb_per_s")
    return {
        "µs": f"{r['median_us']:,.1f}",
        "GB/s": f"{r['gb_per_s']:.1f}",
        "of memory": f"{r['gb_per_s'] / bandwidth:.0%}" if bandwidth else "",
        "times vLLM's op": _times(r, "speedup_vs_vllm"),
        "times our dense op": "" if r.get("speedup_vs_dense") is None else speed_note(r["speedup_vs_dense"]),
    }


def _prefill_called(r: Record) -> Cells:
    return {**_layer(r), "before": f"{r['context']:,}", "chunk": f"{r['chunk']:,}"}


def _prefill_found(r: Record, _: Records) -> Cells:
    return {
        "ms": f"{r['median_us'] / 1e3:,.1f}",
        "of the peak": f"{r['share_of_bound']:.0%}",
        "times vLLM's op": _times(r, "speedup_vs_vllm"),
    }


def _engine_called(r: Record) -> Cells:
    return {"context": f"{r['context']:,}", "batch": f"{r['batch']}", "block": text_of(r.get("block_size"))}


def _engine_found(r: Record, records: Records) -> Cells:
    return {
        "ms per token": f"{r['median_tpot_ms']:.1f}",
        "beside dense": "" if r["method"] == SKIPPED else speed_note(r["speedup_vs_vllm"]),
        "of the bound": f"{r['share_of_bound']:.0%}",
        "ms per 1k tokens": fit(r, records),
        "KV cache, tokens": text_of(r.get("kv_capacity_tokens")),
        "attention that ran": r.get("attention", ""),
    }


def fit(record: Record, records: Records) -> str:
    """The line through a method's times over the context, and from where it lies below dense's of the same run.

    Of lines that differ in the context alone, of one code and machine.
    """
    from vllm_sparq.benchmarks.reporting.plots import break_even, fitted

    def alike(method: str, but: Collection[str]) -> list[Record]:
        same = [one for one in records if one["method"] == method and comparable(one, record)]
        return newest([one for one in same if identity(one, but) == identity(record, but)])

    own = alike(record["method"], ("context",))
    mine = fitted(own)
    if mine is None:
        return ""
    dense = None if record["method"] in (DENSE, SKIPPED) else fitted(alike(DENSE, ("context", *METHOD)))
    even = None if dense is None else break_even(mine, dense)
    if even is None:
        return f"{1024 * mine[0]:.2f}"
    least = min(one["context"] for one in own)
    where = f"below {least:,}" if even < least else f"at {even:,.0f}"
    return f"{1024 * mine[0]:.2f}, breaks even {where}"


def _serve_called(r: Record) -> Cells:
    lengths = [text_of(r[name]) for name in ("input_len", "output_len") if r.get(name) is not None]
    return {"requests": text_of(r.get("num_prompts")), "tokens": " + ".join(lengths), "requests/s": f"{r['rate']}"}


def _serve_found(r: Record, records: Records) -> Cells:
    return {
        "output tokens/s": f"{r['output_throughput']:,.1f}",
        "beside dense": beside_dense(r, records, "output_throughput"),
        "TTFT ms": f"{r['mean_ttft_ms']:,.0f}",
        "TPOT ms": f"{r['mean_tpot_ms']:,.1f}",
        "p99 ITL ms": f"{r['p99_itl_ms']:,.1f}",
        "KV cache, tokens": f"{r['sparq']['kv_capacity_tokens']:,}",
        "longest requests at a time": f"{r['sparq']['max_concurrency']:.1f}",
        "preemptions": f"{r['sparq']['preemptions']}",
        "attention that ran": r["sparq"]["attention"],
    }


def _ray_called(r: Record) -> Cells:
    return {"replicas": f"{r['replicas']}", "runner": r["runner"], "rows": f"{r['rows']:,}"}


def _ray_found(r: Record, records: Records) -> Cells:
    return {
        "output tokens/s": f"{r['output_tokens_per_second']:,.1f}",
        "beside dense": beside_dense(r, records, "output_tokens_per_second"),
        "rows per replica": " + ".join(str(one["rows"]) for one in r["per_replica"].values()),
        "attention that ran": r["attention"],
    }


def _quality_called(r: Record) -> Cells:
    length = r.get("length", r.get("context"))
    return {"task": r["task"], "tokens": text_of(length), "metric": r.get("metric", ""), "prompts": f"{r['n']}"}


def _quality_found(r: Record, _: Records) -> Cells:
    scale = 1 if "metric" in r else 100  # lines of the first version hold shares
    places = PLACES[bool(r.get("lower_is_better"))]

    def interval(low: str, high: str, sign: str = "") -> str:
        return "" if r.get(low) is None else f"{r[low]:{sign}.{places}f} .. {r[high]:{sign}.{places}f}"

    return {
        "score": "" if r.get("score") is None else f"{scale * r['score']:.{places}f}",
        "95% interval": interval("low", "high"),
        "beside dense": "" if r.get("difference") is None else f"{r['difference']:+.{places}f}",
        "its interval": interval("difference_low", "difference_high", "+"),
        "tokens of an answer": f"{r['output_tokens']:.1f}" if "output_tokens" in r else "",
        "bytes read per token": f"{r['kv_bytes_moved']:,.0f}" if "kv_bytes_moved" in r else "",
        "bytes kept per token": f"{r['kv_bytes_held']:,.1f}" if "kv_bytes_held" in r else "",
    }


REQUESTS = ("prompt + answer", "requests")
"""Of the columns that the command's own table has, those that say what was asked."""


def _requests_called(r: Record) -> Cells:
    return {name: requests_bench.columns(r, None)[name] for name in REQUESTS}


def _requests_found(r: Record, records: Records) -> Cells:
    dense = dense_of(r, records)
    cells = {k: v for k, v in requests_bench.columns(r, dense).items() if k not in (*REQUESTS, "method")}
    return cells if dense else {**cells, "beside dense": NO_DENSE}


def _pressure_called(r: Record) -> Cells:
    asked = f"{r['n']} of about {r['prompt_len']:,} + {r['output_len']:,} tokens, {r['rate']:g} a second"
    return {"requests": asked, "MB of KV cache": f"{r['pool']:g}"}


def _pressure_found(r: Record, records: Records) -> Cells:
    return {
        "requests/s": f"{r['request_throughput']:.2f}",
        "beside dense": beside_dense(r, records, "request_throughput"),
        "p99 TTFT ms": f"{r['p99_ttft_ms']:,.0f}",
        "p99 TPOT ms": f"{r['p99_tpot_ms']:,.1f}",
        "KV cache, tokens": f"{r['kv_capacity_tokens']:,}",
        "preemptions": f"{r['preemptions']}",
        "attention that ran": r["attention"],
    }


_LAYER = ("heads", "kv_heads", "head_dim", "batch", "context")

KINDS = {
    "ops": Kind(_ops_called, (*_LAYER, "compression", "r", "k", "block_size"), _ops_found, _LAYER),
    "ops_prefill": Kind(_prefill_called, (*_LAYER, "chunk"), _prefill_found, (*_LAYER, "chunk")),
    "engine": Kind(_engine_called, ("context", "batch", "block_size"), _engine_found, ("batch", "context")),
    "serve": Kind(_serve_called, ("num_prompts", "input_len", "output_len", "rate", "request_rate"), _serve_found),
    "ray": Kind(_ray_called, ("replicas", "runner", "rows"), _ray_found, ("rows", "runner", "replicas")),
    "quality": Kind(
        _quality_called,
        ("task", "length", "context", "metric", "lower_is_better", "n"),
        _quality_found,
        ("task", "length", "text"),
    ),
    "requests": Kind(_requests_called, ("input_len", "output_len", "num_prompts", "batch", "command"), _requests_found),
    "pressure": Kind(_pressure_called, ("n", "prompt_len", "output_len", "rate", "pool"), _pressure_found),
}
"""Kind of line -> its table."""
