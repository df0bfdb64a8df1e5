#!/usr/bin/env python3
"""Are the Triton kernels right on this GPU, and how fast are they? Needs torch, triton, pydantic and a checkout.

    python benchmarks/gpu/gpu_check.py --out gpu.jsonl

First all kernels are compiled, in as many processes as there are cores. Then cell after cell, the most telling first:
ops beside the reference, on pages whose unowned bytes are NaN; captured graphs whose tables change; a decode step and
a chunk of a prompt of one layer, beside FlashAttention (as in vLLM, else flash-attn, flashinfer or PyTorch's SDPA).
Times are medians of graph replays with a cold L2, methods in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

missing = [name for name in ("torch", "pydantic") if importlib.util.find_spec(name) is None]
if missing:  # where vLLM is not, which brings them
    print(f"gpu_check.py: needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "vllm_sparq" / "layout.py").is_file():  # a checkout, which need not be installed
    sys.path.insert(0, str(ROOT))
    import vllm_sparq

    vllm_sparq.__path__.append(str(ROOT))

from vllm_sparq.benchmarks.common.engine_process import EngineProcess, WorkerGoneError
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.gpu import cells, compiling, session
from vllm_sparq.benchmarks.gpu.cases import Case
from vllm_sparq.benchmarks.gpu.cells import Cell
from vllm_sparq.console import UsageError

BENCH = "gpu_ops"

EPILOG = """\
Every line of the output is on the disk before the next cell begins, whatever becomes of that: a cell that fails, kills
its process or stalls leaves a line with an "error", and the rest go on. Before --minutes end it stops, and says what it
left out. The same command again measures what is missing, and so does another machine's with --done.

A first half hour of three calls of ten minutes each:
  python benchmarks/gpu/gpu_check.py --out a.jsonl
  python benchmarks/gpu/gpu_check.py --out b.jsonl --done a.jsonl
  python benchmarks/gpu/gpu_engine.py --out c.jsonl

more examples:
  python benchmarks/gpu/gpu_check.py --list
  python benchmarks/gpu/gpu_check.py --only check --only graph --minutes 4
  python benchmarks/gpu/gpu_check.py --only 'decode/int4*' --only 'prefill/*c32k*' --out int4.jsonl

Records that belong into benchmarks/results come from a clean tree; say --commit where a copy has no git.
Exit code: 0; 1 if a check fails or a cell does; 2 without CUDA or a package, or for bad usage.
"""

SHARE_OF_COMPILING = 0.5
"""Of the budget, at most."""

SAID = ("heads", "kv_heads", "head_size", "block_size", "dtype", "ranking", "format")
"""Of a case, whatever they are; the others where they are not the usual."""

START_SECONDS = 90.0
"""For the process that has the GPU, and torch on a cold disk."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, help="append a JSON line a figure to this file")
    made.add_argument("--done", type=Path, action="append", default=[], help="skip cells that this file holds, too")
    made.add_argument("--again", action="store_true", help="measure cells that --out holds already")
    made.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cells whose name fits, such as 'decode/int4*'"
    )
    made.add_argument("--list", action="store_true", help="name the cells, in the order of their worth, and end")
    made.add_argument("--minutes", type=float, default=9.0, help="be done within this (default 9)")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile (default: all cores)")
    made.add_argument("--no-compile", action="store_true", help="compile each kernel where it is launched first")
    made.add_argument("--commit", help="of this code, where the tree is a copy without git; you vouch that it is clean")
    return made


def describe(cell: Cell) -> dict[str, Any]:
    """What a record says of its cell."""
    usual = asdict(Case())
    case = {name: value for name, value in asdict(cell.case).items() if name in SAID or value != usual[name]}
    read = {
        name: str(value) if isinstance(value, Fraction) else value for name, value in asdict(cell.case.read).items()
    }
    size = {
        name: getattr(cell, name) for name in ("requests", "context", "chunk") if cell.kind not in ("check", "graph")
    }
    return {"kind": cell.kind, "case": case, "read": read, **size, "table_tokens": cell.table_tokens}


def fails(record: dict[str, Any]) -> bool:
    """Whether it is of a cell that went wrong, or of a wrong answer."""
    return isinstance(record.get("error"), str) or ("check" in record and not record["error"] <= record["limit"])


def say(job: Any, record: dict[str, Any]) -> None:
    """A line."""
    print(f"{job.name:<28} {said_of(record)}", flush=True)


def said_of(record: dict[str, Any]) -> str:
    """A record in words."""
    if session.LEFT_OUT in record:
        return f"left out: {record[session.LEFT_OUT]}"
    if session.NO_ROOM in record:
        return f"no room: {record[session.NO_ROOM]}"
    if isinstance(record.get("error"), str):
        return f"FAIL {record['error'][:150]}"
    if "check" in record:
        verdict = "FAIL" if fails(record) else "ok  "
        return f"{verdict} {record['check']:<28} error {record['error']:.2g} limit {record['limit']}"
    if "kernels_us" in record:
        return f"{record['method']:<12} {record['kernels_us']}"
    rate = next((f"{record[key]:8.1f} {key}" for key in ("gb_per_s", "tflop_per_s") if key in record), "")
    ratio = f"{record['speedup_vs_rival']:6.2f} x {record['rival']}" if "rival" in record else ""
    host = f"host {record['host_us']:.0f} us" if "host_us" in record else ""
    return f"{record['method']:<12} {record['median_us']:10.1f} us {rate}  {ratio}  {host}"


def progress(text: str) -> None:
    if sys.stdout.isatty():
        print(f"\r{text}", end="", flush=True)


def compile_all(
    wanted: Sequence[Cell], about: dict[str, Any], folder: Path, output: session.Output, seconds: float, processes: int
) -> None:
    """Fill Triton's cache, and say what it took."""
    target = compiling.Target(capability=about["capability"], multiprocessors=about["multiprocessors"])
    found: list[dict[str, Any]] = []
    for record in compiling.prepare(wanted, target, folder, processes=processes, seconds=seconds, say=progress):
        found += output.add([{"bench": "gpu_compile", "name": record["cell"], **record}])
    for record in (line for line in found[:-1] if "error" in line):
        print(f"\ncompiling for {record['name']}: FAIL {record['error'][:300]}")
    last, times = found[-1], sorted(line["compile_s"] for line in found[:-1] if "compile_s" in line)
    longest = f", the longest {times[-1]:.0f} s" if times else ""
    print(f"\n{len(times)} kernels compiled in {last['compile_s']:.0f} s of {processes} processes{longest}")
    if "error" in last:
        print(last["error"])


def main(words: Sequence[str] | None = None) -> int:
    """Measure what there is time for."""
    args = parser().parse_args(words)
    budget = session.Budget(60 * args.minutes)
    try:
        wanted = cells.selected(cells.all_cells(), args.only)
        if args.list:
            print(*cells.lines(wanted), sep="\n")
            return 0
        check_out(args.out)
        return check(args, wanted, budget)
    except ValueError as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace, wanted: Sequence[Cell], budget: session.Budget) -> int:
    """The cells that are not on record yet.

    Raises:
        UsageError: a file of records cannot be used, or torch sees no GPU.
    """
    import torch

    from vllm_sparq.benchmarks.gpu.worker import GpuWorker

    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here (torch.cuda.is_available() is False)")
    with tempfile.TemporaryDirectory() as temporary:
        hand = session.Hand(partial(EngineProcess, "the process of the GPU", GpuWorker, Path(temporary)))

        def ask(cell: Any, within: float) -> list[dict[str, Any]]:
            return [{**describe(cell), **record} for record in hand.ask("measure", cell, within=within)]

        try:
            machine = hand.ask("about", within=START_SECONDS)
            print(machine)
            output = session.Output(args.out, {**session.code_of(args.commit), **machine})
            held = [*args.done, *([args.out] if args.out and not args.again else [])]
            known = session.done_before(held, BENCH, output.about)
            todo = [cell for cell in wanted if cell.name not in known]
            print(f"{len(todo)} cells to measure, {len(wanted) - len(todo)} on record already")
            if not args.no_compile:
                seconds = SHARE_OF_COMPILING * budget.left
                compile_all(todo, machine, Path(temporary), output, seconds, args.processes)
            session.measure(todo, ask, budget, output, BENCH, say, lambda: hand.is_hopeless)
        except WorkerGoneError as error:
            print(f"gpu_check.py: {error}", *error.said, sep="\n", file=sys.stderr)
            return 1
        finally:
            hand.kill()
    return summary(output.records)


def summary(records: Sequence[dict[str, Any]]) -> int:
    """Say how it went; the exit code."""
    failed = [record for record in records if fails(record)]
    left = [record["name"] for record in records if session.LEFT_OUT in record]
    too_large = [record["name"] for record in records if session.NO_ROOM in record]
    n_checks = sum("check" in record for record in records)
    print(f"{n_checks} checks; failed: {len(failed)}" + "".join(f"\n  {record['name']}" for record in failed))
    if left:
        print(f"left out, {len(left)} cells: {', '.join(left)}; the same command again measures them")
    if too_large:
        print(f"too large for this card, {len(too_large)} cells: {', '.join(too_large)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
