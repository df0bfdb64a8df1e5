"""`vllm-sparq bench ops`: time one decode step of one attention layer, ours beside vLLM's, in one interleaved run.

With ``--op prefill`` it is a chunk of a prompt instead (prefill.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_sparq.attention_backends.engine import LONG_BLOCK_SIZE, PREFERRED_BLOCK_SIZE
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.records import append_records, provenance, recorded, skipped_note
from vllm_sparq.benchmarks.ops import builds, decode, prefill
from vllm_sparq.benchmarks.ops.arguments import layer_shape, numbers_from, sparq_options
from vllm_sparq.benchmarks.ops.cell import Call, Cell
from vllm_sparq.benchmarks.ops.methods import METHODS, format_of
from vllm_sparq.benchmarks.ops.stopwatch import CLOCKS, Stopwatch
from vllm_sparq.config import Options
from vllm_sparq.console import UsageError, place, positive, real_number
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE
from vllm_sparq.ops import native
from vllm_sparq.reads import DenseRead

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EPILOG = """\
Every number is the median over rounds; in a round each method runs once, one after the other, from a cold cache.
GB/s is bytes the method must move over its time; "memory" compares it with a plain read of memory in the same run.
"x vLLM" and "x dense" are how many times faster than vLLM's op and than our own dense op. Read both: the first
also holds what a better dense kernel gives. VLLM_SPARQ_ISA=avx2 or avx512 measures both on a lesser instruction set.
All caches, vLLM's too, lie in 2 MB pages where Linux grants them.

examples:
  vllm-sparq bench ops                                         Llama-3-8B's attention, 1k to 64k tokens
  vllm-sparq bench ops --shape 32/32/128 --context 4096        one key head per query head, as Llama-2-7B
  vllm-sparq bench ops --methods dense,sparq --r 32 --k 128    as many tokens of every context, as in SparQ's paper
  vllm-sparq bench ops --batch 1,8 --threads 4 --out ops.jsonl

With --op prefill each method takes a chunk of a prompt, over as many tokens before it as --context says, in blocks of
its format. "peak" compares its multiply-adds with what the instruction that our kernel consists of does at most.

  vllm-sparq bench ops --op prefill                            2,048 tokens, after 0, 8k and 32k
  vllm-sparq bench ops --op prefill --chunk 512 --context 4096 --methods vllm,dense

Whether a change of the kernels pays, two builds in one process tell:
  cp -r vllm_sparq/lib /tmp/before                             then change the kernels, and compile them
  vllm-sparq bench ops --methods sparq,int4 --beside /tmp/before

On a busy machine wall time means little. Then take
  OMP_WAIT_POLICY=passive vllm-sparq bench ops --clock cpu
which counts the processor time of all threads, divided by their number.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--op", choices=OPS, default="decode", help="what is timed (default: decode)")
    parser.add_argument(
        "--context",
        type=numbers_from(0),
        metavar="S,...",
        help="context lengths in tokens, those of a chunk not among them (default: "
        + "; ".join(f"{name}: {','.join(map(str, op.contexts))}" for name, op in OPS.items())
        + ")",
    )
    parser.add_argument(
        "--chunk",
        type=numbers_from(1),
        default=str(prefill.CHUNK),
        metavar="T,...",
        help=f"new tokens of each request, of --op prefill (default: {prefill.CHUNK})",
    )
    parser.add_argument(
        "--batch", type=numbers_from(1), default="1", metavar="B,...", help="requests that decode together"
    )
    parser.add_argument(
        "--shape",
        type=layer_shape,
        action="append",
        metavar="H/G/D",
        help="query heads / KV heads / head size of a layer; may be repeated (default: 32/8/128)",
    )
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="M,...",
        help="; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
        + f" (default: all; of --op prefill {','.join(prefill.METHODS)})",
    )
    parser.add_argument(
        "--block-size",
        type=numbers_from(1),
        default=str(PREFERRED_BLOCK_SIZE),
        metavar="N,...",
        help=f"tokens per block of our pages (default: {PREFERRED_BLOCK_SIZE}; engines take {LONG_BLOCK_SIZE} for "
        "SparQ where contexts may be long)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="element type of the model (default: bf16)")
    parser.add_argument(
        "--compression",
        type=real_number(least=1),
        default=Options().compression,
        help="dense bytes by those of a sparse read (default: 8, as engines)",
    )
    parser.add_argument("--r", type=positive, help="channels that rank the tokens (default: by --compression)")
    parser.add_argument("--k", type=positive, help="tokens read beside the current one (default: by --compression)")
    parser.add_argument(
        "--ranking", choices=("int4", "int8", "model"), default="int4", help="type of the ranking copy (default: int4)"
    )
    parser.add_argument("--threads", type=positive, help="threads of every op (default: what torch would use)")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds (default: 15)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="see below (default: wall)")
    parser.add_argument(
        "--beside",
        type=place,
        metavar="DIR",
        help="compare our kernels with those of another build, the vllm_sparq/lib of another checkout or a copy of it: "
        "each call by both, in turns over the same pages",
    )
    parser.add_argument("--out", type=place, metavar="FILE", help="append one JSON object per method and shape")
    parser.add_argument("--again", action="store_true", help="measure cells that --out holds already")


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}: use some of {','.join(METHODS)}")
    return names


def _check_beside(args: argparse.Namespace) -> None:
    if args.methods and "vllm" in args.methods:
        raise UsageError("--beside compares kernels of ours: leave vllm out of --methods")
    if args.out is not None:
        raise UsageError("--beside compares two builds here and now, which makes no record: leave --out out")


def settle(args: argparse.Namespace) -> Op:
    """What is timed; fills in what was not asked for.

    Raises:
        UsageError: a method or a context that this op does not have, or that cannot be compared.
    """
    op = OPS[args.op]
    args.context = args.context or list(op.contexts)
    if args.beside is not None:
        _check_beside(args)
    args.methods = args.methods or [name for name in op.methods if args.beside is None or name != "vllm"]
    if other := next((name for name in args.methods if name not in op.methods), None):
        raise UsageError(
            f"--methods {other}: prompts are read densely, whatever reads them later; of --op {args.op} use some of "
            f"{','.join(op.methods)}"
        )
    if args.op == "decode" and 0 in args.context:
        raise UsageError("--context 0: a decode step sees its own token; give 1 or more, or --op prefill")
    return op


def cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations that were asked for.

    Raises:
        UsageError: r does not fit a head size, blocks cannot be cut so, or a cell does not fit in memory.
    """
    if bad := next((n for n in args.block_size if n % BLOCK_SIZE_MULTIPLE), None):
        raise UsageError(f"--block-size {bad} cannot be cut into pages: give a multiple of {BLOCK_SIZE_MULTIPLE}")
    options, found = sparq_options(args), []
    for heads, kv_heads, head_dim in args.shape or [(32, 8, 128)]:
        if args.r is not None and args.r > head_dim:
            raise UsageError(f"--r {args.r} must be 1 to the head size, {head_dim}")
        sizes = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        dtype, every = DTYPES[args.dtype], itertools.product(args.batch, args.context, args.block_size)
        found += [Cell(context=s, batch=b, block_size=n, **sizes, dtype=dtype, options=options) for b, s, n in every]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for cell in found:
        formats = [format_of(name) for name in args.methods if format_of(name) != "model" or name == "quest"]
        # Ours, vLLM's, and the tokens that fill them; and other formats with what ranks their tokens.
        need = 4 * cell.dense_bytes + sum(2 * cell.bytes_moved(DenseRead(), name) for name in formats)
        if need > 0.8 * free:
            raise UsageError(
                f"context {cell.context} x batch {cell.batch} at {cell.shape} needs "
                f"about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: ask for less --context or --batch"
            )
    return found


@dataclass(frozen=True)
class Op:
    """What can be timed: names of its methods, contexts where none are named, and functions on its cells and rows."""

    methods: Iterable[str]
    contexts: Sequence[int]
    cells: Callable[[argparse.Namespace], list[Any]]
    describe: Callable[[Any], str]
    key_of: Callable[[Any, str, Stopwatch], str]
    ready_calls: Callable[[Any, Sequence[str], Stopwatch], dict[str, Call]]
    measure: Callable[[Any, Sequence[str], int, Stopwatch, Callable[[], None]], list[dict[str, Any]]]
    table: Callable[[Sequence[dict[str, Any]], Stopwatch], Table]
    summary: Callable[[Sequence[dict[str, Any]]], list[str]]


OPS = {
    "decode": Op(
        METHODS,
        decode.CONTEXTS,
        cells,
        decode.describe,
        decode.key_of,
        decode.ready_calls,
        decode.measure,
        decode.table,
        decode.summary,
    ),
    "prefill": Op(
        prefill.METHODS,
        prefill.CONTEXTS,
        lambda args: prefill.chunks(cells(args), args.chunk),
        prefill.describe,
        prefill.key_of,
        prefill.ready_calls,
        prefill.measure,
        prefill.table,
        prefill.summary,
    ),
}


def compare(args: argparse.Namespace, op: Op, cells: Sequence[Any], watch: Stopwatch, console: Console) -> int:
    """What `--beside` shows: each call by the kernels of two builds."""
    other, pairs = builds.library_in(args.beside), []
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=len(cells) * args.repeats)
        for cell in cells:
            where = op.describe(cell)
            progress.update(task, description=where)
            calls = op.ready_calls(cell, args.methods, watch)
            pairs += builds.measure(where, calls, other, args.repeats, watch, lambda: progress.advance(task))
    if not pairs:
        raise _nothing_ran(args, op.describe(cells[0]))
    console.print(builds.table(pairs, args.beside, watch))
    return 0


def _nothing_ran(args: argparse.Namespace, where: str) -> UsageError:
    return UsageError(
        f"--methods {','.join(args.methods)}: none of them runs {where} in this type, so nothing was measured: "
        "name another method, or another --shape or --dtype"
    )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def main(args: argparse.Namespace) -> int:
    check_out(args.out)
    if args.clock == "cpu" and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        raise UsageError("--clock cpu would count threads that wait: start with OMP_WAIT_POLICY=passive")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    op, console = settle(args), Console()
    wanted = op.cells(args)
    watch = Stopwatch(args.clock, torch.get_num_threads())
    about = provenance()
    console.print(f"{about['cpu']}: {native.find().reason}")
    if args.beside is not None:
        return compare(args, op, wanted, watch, console)
    keys = [[op.key_of(cell, name, watch) for name in args.methods] for cell in wanted]
    known = recorded(args.out, [key for row in keys for key in row], again=args.again)
    todo = [cell for cell, row in zip(wanted, keys, strict=True) if not known.keys() >= set(row)]
    rows = []
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=len(todo) * args.repeats)
        for cell in todo:
            progress.update(task, description=op.describe(cell))
            new = op.measure(cell, args.methods, args.repeats, watch, lambda: progress.advance(task))
            if args.out is not None:
                append_records(args.out, [{**row, **about} for row in new])
            rows += new
    if todo and not rows:
        raise _nothing_ran(args, op.describe(todo[0]))
    old = [known[key] for cell, row in zip(wanted, keys, strict=True) if cell not in todo for key in row]
    if old:
        console.print(
            f"{len(wanted) - len(todo)} of {len(wanted)} cells: {skipped_note(old)}", highlight=False, soft_wrap=True
        )
        rows = [*old, *rows]
    console.print(op.table(rows, watch))
    for line in op.summary(rows):
        console.print(line)
    return 0
