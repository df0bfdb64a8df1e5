#!/usr/bin/env python3
"""What does a CUDA engine gain? Start-up, prompts and decode steps of stock vLLM and of each backend, on dummy weights.

    python benchmarks/gpu/gpu_engine.py --out gpu.jsonl

Needs vLLM with CUDA and a checkout; nothing of ours need be installed. Engines run one after the other, each alone on
the GPU in a process of its own that may die, with vLLM's default settings first: captured graphs, and all the memory
that it takes. Dense stands beside the methods; --rounds repeats them, so that a drift of the clocks shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "vllm_sparq" / "layout.py").is_file():  # a checkout, which need not be installed
    sys.path.insert(0, str(ROOT))
    import vllm_sparq

    vllm_sparq.__path__.append(str(ROOT))

from vllm_sparq.benchmarks.common.engine_process import EngineProcess, WorkerGoneError
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention
from vllm_sparq.benchmarks.gpu import engines, session, site, worker
from vllm_sparq.benchmarks.gpu.engine_worker import GpuEngineWorker
from vllm_sparq.benchmarks.gpu.engines import EngineJob
from vllm_sparq.console import UsageError, comma_names, llm_arguments

BENCH = "gpu_engine"

EPILOG = """\
Of each engine, a line each, on the disk at once: its start (seconds, GiB that remain for K and V, graphs), the time to
the first token of one prompt of 32k tokens and of 126k, and the time per output token of 16 requests (or 8, if 16 have
no room) of 32k tokens and of one of 126k. An engine that dies leaves its last words, and is tried without graphs next.

examples:
  python benchmarks/gpu/gpu_engine.py --list
  python benchmarks/gpu/gpu_engine.py --methods sparq --models 8b --rounds 2 --minutes 9 --out gpu.jsonl
  python benchmarks/gpu/gpu_engine.py --arguments '{"max_num_seqs": 32}' --commit abc1234 --out gpu.jsonl

The same command again measures what is missing. Exit code: 0; 1 if an engine died; 2 without CUDA, or for bad usage.
"""

N_STEPS = 48


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu_engine.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, help="append JSON lines to this file")
    made.add_argument("--done", type=Path, action="append", default=[], help="skip engines that this file holds, too")
    made.add_argument("--again", action="store_true", help="measure engines that --out holds already")
    made.add_argument(
        "--models", type=comma_names, default=list(engines.SHAPES), help="shapes: 8b, 1b (default: both, 8b first)"
    )
    made.add_argument(
        "--methods", type=comma_names, default=list(engines.METHODS), metavar="M,...", help="beside dense"
    )
    made.add_argument("--rounds", type=int, default=1, help="starts of each engine with graphs (default 1)")
    made.add_argument("--minutes", type=float, default=9.0, help="be done within this (default 9)")
    made.add_argument("--arguments", type=llm_arguments, default={}, metavar="JSON", help="of vLLM's, for every engine")
    made.add_argument("--list", action="store_true", help="name the engines, in the order of their worth, and end")
    made.add_argument("--commit", help="of this code, where the tree is a copy without git; you vouch that it is clean")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Measure what there is time for."""
    args = parser().parse_args(words)
    budget = session.Budget(60 * args.minutes)
    try:
        unknown = [name for name in args.models if name not in engines.SHAPES]
        if unknown:
            raise UsageError(f"--models {unknown[0]!r} is no shape: use {', '.join(engines.SHAPES)}")
        planned = engines.jobs(args.models, args.methods, args.rounds)
        if args.list:
            print(*(f"{job.name:<24} about {job.seconds:.0f} s" for job in planned), sep="\n")
            return 0
        check_out(args.out)
        import torch

        if not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device here (torch.cuda.is_available() is False)")
        with tempfile.TemporaryDirectory() as temporary:
            return run(args, planned, budget, Path(temporary))
    except ValueError as error:
        print(f"gpu_engine.py: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, planned: Sequence[EngineJob], budget: session.Budget, folder: Path) -> int:
    """The engines that are not on record yet; 1 if one died."""
    output = session.Output(args.out, {**session.code_of(args.commit), **machine()})
    held = [*args.done, *([args.out] if args.out and not args.again else [])]
    known = session.done_before(held, BENCH, output.about)
    print(f"{len(planned)} engines, {len({job.name for job in planned} & known)} of them on record already")
    environment = plugin_environment(folder / "site")
    for name, config in engines.SHAPES.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    failed: set[str] = set()

    def say(job: Any, record: dict[str, Any]) -> None:
        if "error" in record:
            failed.add(job.name)
        print(f"{job.name:<24} {said_of(record)}", flush=True)

    def ask(job: Any, within: float) -> Iterator[dict[str, Any]]:
        more = {"max_model_len": engines.MAX_MODEL_LEN, "more": args.arguments}
        return measured(job, folder / job.model, within, environment, **more)

    session.measure(engines.with_eager(planned, failed, known), ask, budget, output, BENCH, say)
    left = [record["name"] for record in output.records if session.LEFT_OUT in record]
    if left:
        print(f"left out, {len(left)} engines: {', '.join(left)}; the same command again measures them")
    return 1 if failed else 0


def measured(
    job: EngineJob,
    folder: Path,
    within: float,
    environment: dict[str, str],
    *,
    max_model_len: int,
    more: dict[str, Any],
    cases: Sequence[Any] = engines.CASES,
    make: Any = GpuEngineWorker,
) -> Iterator[dict[str, Any]]:
    """The records of one engine, as they come.

    Args:
        within: seconds for all of them.
        environment: of its process.
        max_model_len: tokens of the longest request.
        more: arguments of vLLM's.
        cases: what it decodes.
        make: the worker.

    Raises:
        WorkerGoneError: it died, or took too long.
    """
    deadline = time.monotonic() + within
    settings = {"graphs": job.graphs, "max_model_len": max_model_len, "more": more}
    environment = {"VLLM_LOGGING_LEVEL": "INFO", **environment}  # what starting takes is said there
    process = EngineProcess(job.name, started, make, job.method.engine_args, folder, settings, environment=environment)
    about = {"model": job.model, "method": job.method.name, "graphs": job.graphs, "round": job.round}

    def ask(order: str, *arguments: Any) -> Any:
        return process.ask(order, *arguments, within=deadline - time.monotonic())

    process.start(within)
    try:
        found = ask("describe")
        attention = check_attention(job.method, found.pop("report"))
        yield {**about, "what": "start", "attention": attention, **found}
        decoded: set[int] = set()
        for context in dict.fromkeys(case.context for case in cases):
            yield {**about, "what": "prefill", "context": context, "seconds": ask("prefill_s", context)}
            for case in (one for one in cases if one.context == context and context not in decoded):
                size = {"what": "decode", "context": context, "batch": case.batch}
                why = engines.room_for(case, job.method, found["kv_capacity_tokens"])
                if why is not None:
                    yield {**about, **size, "no_room": why}
                    continue
                decoded.add(context)
                ask("prepare", case)
                yield {**about, **size, **figures(ask("step_ms", N_STEPS)), "clocks": worker.clocks()}
        process.close()
    except WrongAttentionError as error:
        raise WorkerGoneError(str(error), []) from None
    finally:
        process.kill()


def started(make: Any, arguments: dict[str, Any], folder: Path, settings: dict[str, Any]) -> Any:
    """The worker, in its process."""
    return make(arguments, folder, **settings)


def figures(times: Sequence[float]) -> dict[str, float]:
    """Of the steps."""
    deciles = statistics.quantiles(times, n=10)
    return {"median_tpot_ms": statistics.median(times), "p10_tpot_ms": deciles[0], "p90_tpot_ms": deciles[-1]}


def said_of(record: dict[str, Any]) -> str:
    """A record in words."""
    if session.LEFT_OUT in record:
        return f"left out: {record[session.LEFT_OUT]}"
    if "no_room" in record:
        return f"{record['batch']} x {record['context']:,}: {record['no_room']}"
    if "error" in record:
        return "\n    ".join([f"FAIL {record['error'][:200]}", *record.get("said", [])])
    if record["what"] == "start":
        cached = f"{record['kv_capacity_tokens']:,} tokens of cache, {record['attention']}"
        return f"started in {record['start_s']:.0f} s, {cached}, {record['graph_mode']}"
    if record["what"] == "prefill":
        return f"{record['context']:,} tokens read in {record['seconds']:.2f} s"
    return f"{record['batch']} x {record['context']:,}: {record['median_tpot_ms']:.2f} ms per token"


def machine() -> dict[str, Any]:
    """The device and the versions, without a process of ours on it."""
    import torch

    versions = {name: version_of(name) for name in ("torch", "triton", "vllm", "transformers")}
    driver = worker.smi("driver_version")
    return {"gpu": torch.cuda.get_device_name(), "driver": driver[0] if driver else None, **versions}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def plugin_environment(folder: Path) -> dict[str, str]:
    """Variables by which processes find our plugin; none where it is installed. Ours hand on their own path too."""
    if version_of("vllm-sparq") is not None:
        return {}
    made = str(site.make_site(ROOT, folder))
    sys.path.insert(0, made)
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([made, *([before] if before else [])])
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # else the folder that we are called in comes first


if __name__ == "__main__":
    sys.exit(main())
