"""What the simulations of `vllm-sparq research` share: prompts of `vllm-sparq eval`, lines, and the table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.records import append_records, provenance
from vllm_sparq.benchmarks.quality.cells import CONFIDENCE
from vllm_sparq.benchmarks.quality.prompts import GENERATED, Wanted
from vllm_sparq.benchmarks.quality.store import digest
from vllm_sparq.benchmarks.tasks.generated import TASKS, Example, score
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import UsageError, check_model, comma_names, comma_numbers, natural, place, positive


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which prompts, and where the records go."""
    parser.add_argument("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    parser.add_argument("--tasks", type=comma_names, default=list(TASKS), help=f"of {', '.join(GENERATED)}")
    parser.add_argument("--lengths", type=comma_numbers, default=[1024], help="prompt tokens (default: 1024)")
    parser.add_argument("--n", type=positive, default=50, help="prompts per task and length (default: 50)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", type=place, metavar="FILE", help="add a JSON line for each row of the table")


def checked(args: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what cannot be used.

    Raises:
        UsageError: no model, an unknown task, or records that cannot be written.
    """
    check_out(args.out)
    args.model = check_model(args.model)
    ModelShape.of(args.model)
    unknown = [task for task in args.tasks if task not in GENERATED]
    if unknown:
        raise UsageError(f"unknown task {unknown[0]!r}: choose from {', '.join(GENERATED)}")


def cells_of(args: argparse.Namespace, max_model_len: int) -> Iterator[list[Example]]:
    """The examples of each task and length.

    Raises:
        UsageError: they cannot be made.
    """
    for task in args.tasks:
        for length in args.lengths:
            wanted = Wanted(model=args.model, tasks=[task], lengths=[length], n=args.n, seed=args.seed)
            yield wanted.examples(max_model_len)


def line(example: Example, name: str, text: str, n_tokens: int = 0) -> dict[str, Any]:
    """Of an example that ``name`` answered, as `cells` takes it."""
    return {
        "prompt_sha": digest(example.prompt, example.prompt_ids, example.answer, example.seed),
        "task": example.task,
        "length": example.length,
        "seed": example.seed,
        "method": name,
        "metric": example.metric,
        "n_cut_tokens": 0,
        "prompt_tokens": example.n_prompt_tokens,
        "output": text,
        "output_tokens": n_tokens,
        "score": score(example, text),
    }


def keep(args: argparse.Namespace, bench: str, records: Sequence[dict[str, Any]], **about: Any) -> None:
    """Write the records, if they are wanted."""
    if args.out:
        about = {"seed": args.seed, "model": args.model.name, **about, **provenance()}
        append_records(args.out, [{**record, "bench": bench, **about} for record in records])


def table(records: Sequence[dict[str, Any]]) -> Any:
    """A row per method, task and length; with the share of elements that is read where that is known."""
    from rich import box
    from rich.table import Table

    shares = any("share_read" in record for record in records)
    title = f"Points of 100, {CONFIDENCE:.0%} bootstrap intervals" + ("; read: share of dense's elements" * shares)
    view = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("task", "length", "method", "score", "beside dense", "n", *["read"] * shares):
        view.add_column(column, justify="left" if column in ("task", "method") else "right", no_wrap=True)
    for record in records:
        difference = ""
        if "difference" in record:
            ends = f"{record['difference_low']:+.1f} .. {record['difference_high']:+.1f}"
            difference = f"{record['difference']:+.1f} ({ends})"
        elif view.row_count:
            view.add_section()
        view.add_row(
            record["task"],
            f"{record['length']:,}",
            record["method"],
            f"{record['score']:.1f} ({record['low']:.1f} .. {record['high']:.1f})",
            difference,
            str(record["n"]),
            *([f"{record['share_read']:.3f}"] if shares else []),
        )
    return view
