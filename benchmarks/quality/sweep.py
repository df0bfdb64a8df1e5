"""How few channels and tokens are enough: a grid of r and k on the same prompts, with the bytes that each cell reads.

    vllm-sparq sweep --r 8,16,32,64 --k 32,64,128,256,512 --tasks repetition,needle

All cells read one cache, so two engines do: dense and SparQ. Lines and records are those of `vllm-sparq eval`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.lines import check_folder
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.quality import evaluate as quality
from vllm_sparq.benchmarks.quality.engine import Run
from vllm_sparq.console import UsageError, comma_names, comma_numbers, json_object, make_console, positive


def grid(name: str, ranks: Sequence[int], tokens: Sequence[int], options: dict[str, Any]) -> list[Method]:
    """Dense, and the method with every r and k.

    Raises:
        UsageError: a method that does not read sparsely, or numbers that it cannot take.
    """
    if not Method.named(name, options).ranks_tokens:
        raise UsageError(f"method {name!r} ranks no tokens by r channels, so r means nothing: name sparq or sparq+int4")
    found = [Method.named(DENSE)]
    for r in ranks:
        for k in tokens:
            method = Method.named(name, {"dense_below": 0, **options, "r": r, "k": k})
            found.append(replace(method, name=f"{name} r={r} k={k}"))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq sweep`."""
    quality.add_model_arguments(parser)
    parser.add_argument("--r", type=comma_numbers, default=[4, 8, 16, 32], help="channels (default: 4,8,16,32)")
    parser.add_argument("--k", type=comma_numbers, default=[32, 64, 128, 256], help="tokens (default: 32,64,128,256)")
    parser.add_argument(
        "--method", default="sparq", help="what reads sparsely: sparq, sparq+int4, ... (default: sparq)"
    )
    parser.add_argument("--options", type=json_object, default={}, help="more sparq options, as JSON")
    parser.add_argument("--tasks", type=comma_names, default=["repetition", "needle"], help="as in `vllm-sparq eval`")
    parser.add_argument("--lengths", type=comma_numbers, default=[1024], help="prompt tokens (default: 1024)")
    parser.add_argument("--n", type=positive, default=32, help="prompts per task and length (default: 32)")
    quality.add_text_arguments(parser)
    parser.epilog = """\
examples:
  vllm-sparq sweep                                               16 cells on the bundled model
  vllm-sparq sweep --method sparq+int4 --tasks text --text docs  bits per byte of your text, over int4 blocks
  vllm-sparq sweep --r 64 --k 8,16,32,64 --out results/sweep     with every channel: what k alone costs
"""


def main(args: argparse.Namespace) -> int:
    """Answer, score, write, print."""
    from vllm_sparq.benchmarks.quality.store import FILES, Store

    check_folder(args.out, files=FILES)
    console = make_console()
    methods = grid(args.method, args.r, args.k, args.options)
    run, examples = quality.prepare(args, console)
    check_ranks(run, args.r)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(args.out or Path(scratch), run)
        lines = quality.evaluate(methods, run, examples, store, console)
        about = {"seed": args.seed, "n_wanted": args.n}
        records = store.write_cells(quality.summary(lines, methods, run, about), about)
    for view in tables(records, methods, args.r, args.k):
        console.print(view)
    return 0


def check_ranks(run: Run, ranks: Sequence[int]) -> None:
    """Refuse more channels than the model has, before an engine does.

    Raises:
        UsageError: the largest is too large.
    """
    from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape

    head_size = CacheShape.of(run.model, run.dtype).head_size
    if max(ranks) > head_size:
        raise UsageError(f"--r {max(ranks)} is more than the {head_size} channels of the model's heads")


def tables(
    records: Sequence[dict[str, Any]], methods: Sequence[Method], ranks: Sequence[int], tokens: Sequence[int]
) -> list[Any]:
    """One grid a task and length: score, its difference from dense, bytes read per output token times dense's."""
    from rich import box
    from rich.table import Table

    cells = {(record["task"], record["length"], record["method"]): record for record in records}
    found: list[Any] = []
    for task, length in dict.fromkeys((record["task"], record["length"]) for record in records):
        dense = cells[task, length, DENSE]
        if "score" not in dense:
            found.append(f"{task} at {length}: every prompt was skipped, being longer than the model's context")
            continue
        digits = 3 if dense["lower_is_better"] else 1
        where = task if length is None else f"{task} at {length:,} tokens"
        title = f"{where}, dense {dense['score']:.{digits}f}\ndifference (95% interval); KV bytes read, times dense's"
        view = Table(title=title, box=box.SIMPLE_HEAD)
        view.add_column("r", justify="right")
        for k in tokens:
            view.add_column(f"k = {k}", justify="right")
        rows = [methods[1 + i * len(tokens) : 1 + (i + 1) * len(tokens)] for i in range(len(ranks))]
        for r, row in zip(ranks, rows, strict=True):
            view.add_row(str(r), *(_cell(cells[task, length, one.name], dense, digits) for one in row))
        found.append(view)
    return found


def _cell(record: dict[str, Any], dense: dict[str, Any], digits: int) -> str:
    moved = record["kv_bytes_moved"] / dense["kv_bytes_moved"]
    ends = f"{record['difference_low']:+.{digits}f} .. {record['difference_high']:+.{digits}f}"
    return f"{record['difference']:+.{digits}f} {moved:.2f}x\n({ends})"
