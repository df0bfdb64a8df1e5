"""`vllm-sparq bench serve`: `vllm bench serve` against a real `vllm serve` of each method, dense always among them."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_sparq import processes
from vllm_sparq.benchmarks.common.cache_layout import CacheLayout
from vllm_sparq.benchmarks.common.engine_arguments import refuse, words_given
from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention, speed_note, with_dense
from vllm_sparq.benchmarks.common.records import (
    append_records,
    case_key,
    comparable,
    provenance,
    recorded,
    skipped_note,
)
from vllm_sparq.benchmarks.common.server import HOST, WORKER_REPORT, Server, ServerError, wait_until_healthy
from vllm_sparq.benchmarks.common.threads import engine_threads
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import (
    UsageError,
    check_model,
    comma_names,
    json_object,
    make_console,
    natural,
    place,
    positive,
    real_number,
    serve_words,
    shown,
)

SHORT = {"half": "float16", "float": "float32"}
"""Other names that vLLM has for element types."""

PREEMPTIONS = "vllm:num_preemptions_total"
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"
CACHE = "vllm:cache_config_info"

GIVEN = {
    "model": "--model",
    "config": "",
    "served_model_name": "",
    "host": "",
    "port": "",
    "attention_backend": "--methods",
    "attention_config": "--methods",
    "additional_config": "--methods and --options",
    "worker_extension_cls": "",
    "kv_cache_memory_bytes": "--kv-cache-mib",
    "kv_cache_dtype": "block formats as in --methods int8",
}
"""Arguments of `vllm serve` that the command sets itself or that its bytes of cache are counted by."""

SERVICE_LEVELS = ("ttft", "tpot", "e2el")
"""What `vllm bench serve --goodput` knows."""

WARM_UP = "warm-up"
"""Stands for a rate where the seed of the first requests is drawn."""

DROPPED = ("tokenizer_id", "label")
"""Keys of the client's that say nothing: a path of this machine, a name of none. Lists of every request go as well."""

EPILOG = """\
The keys of a record are those of `vllm bench serve --save-result`; `sparq` beside them says what the server was: the
method and its options, the attention class inside the worker, the KV cache in tokens, how many requests of the
longest kind fit at a time, preemptions during the run, the share of prompt tokens that the prefix cache knew, and the
lengths of the answers. The requests of a rate are new to the cache, whatever ran before, and the same for all methods.

examples:
  vllm-sparq bench serve --model M --methods sparq,kivi --request-rate 2,8,inf
  vllm-sparq bench serve --methods int4 --request-rate inf --num-prompts 100 --serve-args '["--max-num-seqs", "32"]'
  vllm-sparq bench serve --methods sparq --request-rate 4 --goodput ttft:500 tpot:50 --out serve.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq bench serve`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    add("--methods", type=comma_names, default=["sparq"], metavar="M,...", help="beside dense (default: sparq)")
    add("--request-rate", type=rates, default="inf", metavar="R,...", help="per second; inf: all at once (default)")
    add("--num-prompts", type=positive, default=64, help="requests per rate (default: 64)")
    add("--input-len", type=positive, default=512, metavar="TOKENS", help="of a random prompt (default: 512)")
    add("--output-len", type=positive, default=64, metavar="TOKENS", help="of every answer (default: 64)")
    add("--max-concurrency", type=positive, help="requests that the client has open at a time (default: no limit)")
    add("--goodput", nargs="+", type=service_level, metavar="KEY:MS", help="service levels, such as ttft:500 tpot:50")
    add("--kv-cache-mib", type=positive, help="KV cache of each server, the same for all (default: 256 on a CPU)")
    add("--serve-args", type=serve_words, default=[], metavar="JSON", help="more arguments of `vllm serve`, as a list")
    add("--options", type=json_object, default={}, metavar="JSON", help="sparq options on top of every method")
    add("--seed", type=natural, default=0)
    add(
        "--timeout",
        type=real_number(above=0),
        default=600,
        help="seconds that a server may take to start (default: 600)",
    )
    add("--out", type=place, help="append one JSON line per method and rate")
    add("--again", action="store_true", help="measure cases that --out holds already")


def service_level(text: str) -> str:
    """For argparse: a service level that vLLM's client takes."""
    key, _, limit = text.partition(":")
    try:
        is_usable = key in SERVICE_LEVELS and 0 <= float(limit) < math.inf
    except ValueError:
        is_usable = False
    if not is_usable:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no service level: give {', '.join(SERVICE_LEVELS)} and milliseconds, such as ttft:500"
        )
    return text


def rates(text: str) -> list[float]:
    """For argparse: requests per second, comma-separated; ``inf`` is one."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rates such as 2,8,inf") from None
    if not all(rate > 0 for rate in found):  # nan is not, either
        raise argparse.ArgumentTypeError(f"{text!r} holds a rate that is not above 0")
    return found


def main(args: argparse.Namespace) -> int:
    """A server per method, a client per rate; print the table, write the lines."""
    check_out(args.out)
    console = make_console()
    model = check_model(args.model)
    refuse((name for name, _ in words_given(args.serve_args)), GIVEN, "--serve-args")
    check_lengths(args, model)
    methods = [Method.named(method.name, args.options) for method in with_dense(args.methods)]
    keys = {(m.name, rate): key_of(args, model, m, rate) for m in methods for rate in args.request_rate}
    known = recorded(args.out, keys.values(), again=args.again)
    records: list[dict[str, Any]] = []
    folder, failed = Path(tempfile.mkdtemp(prefix="vllm-sparq-serve-")), False
    try:
        for method in methods:
            todo = [rate for rate in args.request_rate if keys[method.name, rate] not in known]
            if not todo:
                continue
            with console.status(f"{method.name}: starting vllm serve ...") as status:
                for n_done, result in enumerate(measure(args, model, method, todo, folder), start=1):
                    result["key"] = keys[method.name, float(result["rate"])]
                    records.append(result | provenance())
                    if args.out:
                        append_records(args.out, records[-1:])
                    status.update(f"{method.name}: {n_done} of {len(todo)} rates done ...")
    except (ServerError, WrongAttentionError) as error:
        failed = True
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    finally:
        if not failed:  # the message says where the logs are
            shutil.rmtree(folder, ignore_errors=True)
    if known or records:
        console.print(table([*known.values(), *records], args.request_rate))
    if known:
        console.print(skipped_note(known.values()), highlight=False, soft_wrap=True)
    return int(failed)


def check_lengths(args: argparse.Namespace, model: Path) -> None:
    """Refuse requests that the model has no positions for.

    Raises:
        UsageError: they are too long.
    """
    limit = ModelShape.of(model).max_model_len
    if args.input_len + args.output_len > limit:
        raise UsageError(
            f"--input-len {args.input_len} and --output-len {args.output_len} need more positions than the {limit} "
            "of the model: ask for less"
        )


def key_of(args: argparse.Namespace, model: Path, method: Method, rate: float) -> str:
    """Of the record of one method at one rate."""
    names = (
        "num_prompts",
        "input_len",
        "output_len",
        "max_concurrency",
        "goodput",
        "kv_cache_mib",
        "serve_args",
        "seed",
    )
    fields = {name: getattr(args, name) for name in names}
    fields |= {"model": model.name, "weights": fingerprint(model), **asdict(method), "rate": str(rate)}
    return case_key("serve", fields | layout_of(args, model, method).fields | {"threads": threads_of(model)})


def threads_of(model: Path) -> int:
    """Of each server, which is bound to no cores; the bundled model's have one, unless the environment says more."""
    return int(engine_threads(1 if model == WEIGHTS else None)["threads"])


def layout_of(args: argparse.Namespace, model: Path, method: Method) -> CacheLayout:
    """How the server of a method will cut its cache."""
    words = {name: value for name, value in words_given(args.serve_args) if value is not None}
    given = {
        option: given_number(words[option], f"--serve-args: {option}")
        for option in ("--block-size", "--max-model-len")
        if option in words
    }
    dtype = words.get("--dtype", "auto")
    shape = ModelShape.of(model, SHORT.get(dtype, dtype))
    return CacheLayout.of(
        method,
        shape,
        max_model_len=given.get("--max-model-len", shape.max_model_len),
        block_size=given.get("--block-size"),
    )


def given_number(text: str, what: str) -> int:
    """Of an argument of vLLM's that we have to know.

    Raises:
        UsageError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{what} {text!r} is not a whole number above 0")
    return int(text)


def seed_of(seed: int, rate: float | str) -> int:
    """Of the requests of a rate: its own, whatever other rates are measured in whichever order."""
    return (seed + zlib.crc32(str(rate).encode())) % 2**32


def serve_arguments(args: argparse.Namespace, method: Method) -> list[str]:
    """Of `vllm serve`, for a method."""
    import torch

    found = []
    if not torch.cuda.is_available():
        found += ["--enforce-eager", "--kv-cache-memory-bytes", str((args.kv_cache_mib or 256) << 20)]
    elif args.kv_cache_mib:
        found += ["--kv-cache-memory-bytes", str(args.kv_cache_mib << 20)]
    if method.backend is None:
        found += ["--worker-extension-cls", WORKER_REPORT]
    else:
        found += ["--attention-backend", method.backend, "--additional-config", json.dumps(method.additional_config)]
    return [*found, *args.serve_args]


def measure(
    args: argparse.Namespace, model: Path, method: Method, todo: Sequence[float], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yields a record per rate, from one server.

    Raises:
        ServerError: the server or the client failed.
        WrongAttentionError: the server runs another attention than the method's.
    """
    threads = {"OMP_NUM_THREADS": "1"} if model == WEIGHTS else {}
    with Server(method.name, model, serve_arguments(args, method), folder=folder, environment=threads) as server:
        wait_until_healthy([server], timeout_s=args.timeout)
        attention = check_attention(method, server.attention_report())
        first = seed_of(args.seed, WARM_UP)
        client(args, model, server, rate=math.inf, n=min(4, args.num_prompts), seed=first, folder=folder)
        for rate in todo:
            server.reset_prefix_cache()
            before = counters(server)
            seed = seed_of(args.seed, rate)
            result = client(args, model, server, rate=rate, n=args.num_prompts, seed=seed, folder=folder)
            counted = {name: value - before[name] for name, value in counters(server).items()}
            labels = next(labels for name, labels, _ in server.metrics() if name == CACHE)
            lengths = result.get("output_lens") or [0]
            yield {
                **{k: v for k, v in result.items() if k not in DROPPED and not isinstance(v, list)},
                "bench": "serve",
                "method": method.name,
                "model": model.name,
                "rate": rate if math.isfinite(rate) else "inf",
                "input_len": args.input_len,
                "output_len": args.output_len,
                "block_size": int(labels["block_size"]),
                "kv_bytes_per_token": layout_of(args, model, method).kv_bytes_per_token,
                "threads": threads_of(model),
                "serve_args": args.serve_args,
                "kv_cache_mib": args.kv_cache_mib,
                "seed": args.seed,
                "sparq": {
                    "method": method.name,
                    "options": method.options,
                    "attention": attention,
                    "kv_capacity_tokens": int(float(labels["kv_cache_size_tokens"])),
                    "max_concurrency": round(float(labels["kv_cache_max_concurrency"]), 2),
                    "preemptions": int(counted[PREEMPTIONS]),
                    "prefix_cache_hit_rate": round(counted[HITS] / counted[QUERIES], 4) if counted[QUERIES] else 0.0,
                    "mean_output_len": round(statistics.fmean(lengths), 2),
                    "max_output_len": max(lengths),
                },
            }


def counters(server: Server) -> dict[str, float]:
    """Preemptions, and tokens that the prefix cache was asked for and knew, of all requests so far."""
    found = dict.fromkeys((PREEMPTIONS, QUERIES, HITS), 0.0)
    for name, _, value in server.metrics():
        if name in found:
            found[name] += value
    return found


def client(
    args: argparse.Namespace, model: Path, server: Server, *, rate: float, n: int, seed: int, folder: Path
) -> dict[str, Any]:
    """One run of `vllm bench serve`.

    Raises:
        ServerError: it failed, or some requests did.
    """
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"),
        *("--host", HOST, "--port", str(server.port), "--model", server.name, "--tokenizer", str(model)),
        *("--dataset-name", "random", "--random-input-len", str(args.input_len)),
        *("--random-output-len", str(args.output_len), "--num-prompts", str(n), "--seed", str(seed)),
        *("--request-rate", str(rate), "--percentile-metrics", "ttft,tpot,itl,e2el", "--ignore-eos"),
        *("--disable-tqdm", "--save-result", "--save-detailed"),
        *("--result-dir", str(folder), "--result-filename", result.name),
    ]
    if args.max_concurrency:
        command += ["--max-concurrency", str(args.max_concurrency)]
    if args.goodput:
        command += ["--goodput", *args.goodput]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        processes.bound_to_parent(command), capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    if done.returncode or not result.exists():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ServerError(f"vllm bench serve failed with exit code {done.returncode}:\n{last}")
    found: dict[str, Any] = json.loads(result.read_text())
    if found["completed"] != n:
        raise server.error(f"{n - found['completed']} of {n} requests to {server.name} failed")
    return found


def table(records: list[dict[str, Any]], order: Sequence[float]) -> Any:
    """A row per rate and method: rates, latencies, capacity, and the attention that ran."""
    from rich.table import Table

    view = Table(title=f"vllm bench serve, {records[0]['model']}, {records[0]['num_prompts']} requests per rate")
    for column in ("rate", "method", "tokens/s", "beside dense", "TTFT ms", "TPOT ms", "p99 ITL ms", "KV tokens"):
        view.add_column(column, justify="left" if column == "method" else "right")
    view.add_column("preempted", justify="right")
    view.add_column("from cache", justify="right")
    view.add_column("attention")
    for rate in order:
        rows = [record for record in records if float(record["rate"]) == rate]
        rows.sort(key=lambda record: record["method"] != DENSE)
        for i, row in enumerate(rows):
            view.add_row(
                f"{rate:g}" if i == 0 else "",
                row["method"],
                f"{row['output_throughput']:,.1f}",
                speed_note(row["output_throughput"] / rows[0]["output_throughput"]) if comparable(row, rows[0]) else "",
                f"{row['mean_ttft_ms']:,.0f}",
                f"{row['mean_tpot_ms']:,.1f}",
                f"{row['p99_itl_ms']:,.1f}",
                f"{row['sparq']['kv_capacity_tokens']:,}",
                str(row["sparq"]["preemptions"]),
                f"{row['sparq']['prefix_cache_hit_rate']:.0%}",
                row["sparq"]["attention"],
                end_section=i == len(rows) - 1,
            )
    return view
