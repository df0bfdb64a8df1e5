"""Answers that outgrow the KV cache: dense, evicting and preempting, evicting instead of preempting; the same trace.

    vllm-sparq bench pressure --methods h2o --pool 20

Requests arrive at random times and write long answers on a pool that cannot hold them all. vLLM then preempts: a
request loses its cache and is computed again. A method that evicts is run twice, with ``pressure: preempt`` and with
``pressure: evict``, where running requests give up their coldest blocks instead. All engines have the same bytes.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import CacheLayout, layout_in_use
from vllm_sparq.benchmarks.common.engine_arguments import refuse
from vllm_sparq.benchmarks.common.engine_process import EngineProcess
from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.proof import check_attention, engine_report, with_dense
from vllm_sparq.benchmarks.common.records import append_records, case_key, provenance
from vllm_sparq.benchmarks.common.threads import engine_threads
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import check_model, comma_names, llm_arguments, natural, place, real_number, whole_number

GIVEN = {
    "model": "--model",
    "attention_backend": "--methods",
    "additional_config": "--methods",
    "kv_cache_memory_bytes": "--pool",
    "max_model_len": "--prompt-len and --output-len",
    "enforce_eager": "",
    "enable_prefix_caching": "",
    "disable_log_stats": "",
}
"""Arguments of vLLM's that a trace sets itself, and what to use instead; nothing may."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What is asked. Tokens, requests a second, MB of KV cache.

    Attributes:
        n: requests.
        rate: arrivals a second, at random times.
        prompt_len, output_len: of each request, drawn evenly from half to one and a half times of it.
        pool: KV cache of each engine.
    """

    n: int
    rate: float
    prompt_len: int
    output_len: int
    pool: float
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(len(prompt) + n for _, prompt, n in self.requests()) + 1

    def requests(self) -> list[tuple[float, list[int], int]]:
        """Arrival in seconds, prompt, and tokens to write, in order of arrival."""
        rng, now, found = random.Random(self.seed), 0.0, []
        for _ in range(self.n):
            now += rng.expovariate(self.rate)
            n_prompt, n_output = (
                rng.randint(length // 2, length * 3 // 2) for length in (self.prompt_len, self.output_len)
            )
            found.append((now, [rng.randrange(10, 1000) for _ in range(n_prompt)], n_output))
        return found


def engines(names: list[str]) -> list[Method]:
    """Dense, and each method; those that evict twice.

    Raises:
        UsageError: a name that means nothing.
    """
    found = []
    for method in with_dense(names):
        evicts = method.backend is not None and method.parsed.retention != "all"
        for pressure in ("preempt", "evict") if evicts else (None,):
            options = {**method.options, **({"pressure": pressure} if pressure else {})}
            name = f"{method.name}, {pressure}" if pressure else method.name
            found.append(replace(method, name=name, options=options))
    return found


class TraceWorker:
    """One engine, in the process that it is made in, that answers a whole trace."""

    def __init__(self, method: Method, model: Path, trace: Trace, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.method, self.trace = method, trace
        self.llm = LLM(
            str(model),
            enforce_eager=True,
            kv_cache_memory_bytes=int(trace.pool * 1e6),
            max_model_len=trace.max_model_len,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **options,
            **method.engine_args,
        )
        self.engine: Any = self.llm.llm_engine
        self.attention = check_attention(method, engine_report(self.engine.vllm_config))

    def run(self) -> dict[str, Any]:
        """Ask everything when its time has come; one record."""
        import torch

        requests = self.trace.requests()
        times = self.times_of(requests)
        whole = all(len(times[str(i)]) == n_output for i, (_, _, n_output) in enumerate(requests))
        metrics = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        scheduler = self.engine.engine_core.engine_core.scheduler
        arrivals = {str(i): arrival for i, (arrival, _, _) in enumerate(requests)}
        return {
            "method": self.method.name,
            "options": self.method.options,
            "attention": self.attention,
            "threads": torch.get_num_threads(),
            "n_failed": 0 if whole else sum(len(t) == 0 for t in times.values()) or 1,
            "preemptions": int(metrics["vllm:num_preemptions"]),
            "preemptions_avoided": getattr(scheduler, "n_preemptions_avoided", 0),
            "kv_capacity_tokens": int(self.engine.vllm_config.cache_config.kv_cache_size_tokens),
            **layout_in_use(self.engine).fields,
            **summary(times, arrivals),
        }

    def times_of(self, requests: list[tuple[float, list[int], int]]) -> dict[str, list[float]]:
        """Request -> when each of its tokens came (seconds)."""
        from vllm import SamplingParams

        times: dict[str, list[float]] = {str(i): [] for i in range(len(requests))}
        begin, asked, done = time.perf_counter(), 0, 0
        while done < len(requests):
            now = time.perf_counter() - begin
            while asked < len(requests) and requests[asked][0] <= now:
                _, prompt, n_output = requests[asked]
                params = SamplingParams(temperature=0, max_tokens=n_output, ignore_eos=True, detokenize=False)
                self.engine.add_request(str(asked), {"prompt_token_ids": prompt}, params)
                asked += 1
            if not self.engine.has_unfinished_requests():
                time.sleep(0.001)
                continue
            for output in self.engine.step():
                times[output.request_id].append(time.perf_counter() - begin)
                done += output.finished
        return times


def summary(times: dict[str, list[float]], arrivals: dict[str, float]) -> dict[str, float]:
    """Rates and latencies, named as `vllm bench serve` names them, from when each token came (seconds)."""
    duration = max(t[-1] for t in times.values())
    per_token = [1e3 * (t[-1] - t[0]) / (len(t) - 1) for t in times.values() if len(t) > 1]
    gaps = [1e3 * (b - a) for t in times.values() for a, b in pairwise(t)]
    first = [1e3 * (t[0] - arrivals[name]) for name, t in times.items()]
    found = {
        "duration": duration,
        "request_throughput": len(times) / duration,
        "output_throughput": sum(map(len, times.values())) / duration,
    }
    for name, values in (("tpot", per_token), ("itl", gaps), ("ttft", first)):
        found |= {f"mean_{name}_ms": fmean(values), f"p99_{name}_ms": quantiles(values, n=100)[98]}
    return {name: round(value, 4) for name, value in found.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq bench pressure`."""
    parser.add_argument("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    parser.add_argument("--methods", type=comma_names, default=["h2o"], help="beside dense (default: h2o)")
    parser.add_argument("--n", type=whole_number(2), default=48, help="requests, 2 or more (default: 48)")
    parser.add_argument("--rate", type=real_number(above=0), default=8.0, help="arrivals a second (default: 8)")
    parser.add_argument("--prompt-len", type=whole_number(2), default=200, help="tokens, on average (default: 200)")
    parser.add_argument("--output-len", type=whole_number(4), default=700, help="tokens, on average (default: 700)")
    parser.add_argument(
        "--pool", type=real_number(above=0), default=16.0, help="MB of KV cache of each engine (default: 16)"
    )
    parser.add_argument("--engine-args", type=llm_arguments, default={}, help="more arguments of vLLM's, as JSON")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", type=place, help="append one JSON line per engine")


def main(args: argparse.Namespace) -> int:
    """Run the trace through each engine, print the table, write the lines."""
    from rich.console import Console

    check_out(args.out)
    refuse(args.engine_args, GIVEN)
    console, model = Console(), check_model(args.model)
    trace = Trace(
        n=args.n, rate=args.rate, prompt_len=args.prompt_len, output_len=args.output_len, pool=args.pool, seed=args.seed
    )
    case = {**asdict(trace), "model": model.name, "engine_args": args.engine_args}
    shape, rows = ModelShape.of(model, args.engine_args.get("dtype", "auto")), []
    for method in engines(args.methods):
        with console.status(f"{method.name}: {args.n} requests ..."):
            row = run(method, model, trace, args.engine_args)
        key = key_of(case | {"weights": fingerprint(model)}, method, shape, trace.max_model_len)
        rows.append({"bench": "pressure", "key": key, **case, **row})
        if args.out:
            append_records(args.out, [{**rows[-1], **provenance()}])
    console.print(table(rows, trace))
    return int(any(row["n_failed"] for row in rows))


def key_of(case: dict[str, Any], method: Method, shape: ModelShape, max_model_len: int) -> str:
    """Of the record of one method."""
    block_size = case["engine_args"].get("block_size")
    layout = CacheLayout.of(method, shape, max_model_len=max_model_len, block_size=block_size)
    fields = {**case, "method": method.name, "options": method.options, **layout.fields}
    return case_key("pressure", fields | engine_threads())


def run(method: Method, model: Path, trace: Trace, options: dict[str, Any]) -> dict[str, Any]:
    """One engine in a process of its own.

    Raises:
        UsageError: it did not start, runs another attention, or ended before it was through.
    """
    with EngineProcess(f"the engine of {method.name!r}", TraceWorker, method, model, trace, options) as engine:
        row: dict[str, Any] = engine.ask("run")
        return row


def table(rows: list[dict[str, Any]], trace: Trace) -> Any:
    """A line per engine; latencies are 99th percentiles in ms."""
    from rich.table import Table

    view = Table(title=f"{trace.n} requests on {trace.pool:g} MB of KV cache, {trace.rate:g} a second; p99 in ms")
    view.add_column("method", no_wrap=True)
    for column in ("req/s", "tok/s", "TPOT", "ITL", "TTFT", "preempted", "avoided", "failed"):
        view.add_column(column, justify="right")
    for row in rows:
        view.add_row(
            row["method"],
            f"{row['request_throughput']:.2f}",
            f"{row['output_throughput']:.0f}",
            *(f"{row[f'p99_{name}_ms']:.1f}" for name in ("tpot", "itl", "ttft")),
            *(str(row[name]) for name in ("preemptions", "preemptions_avoided", "n_failed")),
        )
    return view
