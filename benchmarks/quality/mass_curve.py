"""Does it pay to let attention decide how much is read? Answers against tokens read, with a mass and with a fixed k.

    vllm-sparq research mass
    vllm-sparq research mass --mass 0.5,0.9 --lengths 1024,2048 --out build/mass_curve.jsonl

With a mass m each decode step, layer and KV head reads as few tokens as hold the share m of the estimated probability,
at most half of the context. How many that is on average is counted; then the same prompts are answered with that many
tokens every time (a fixed k), so that the two differ in how the same number of tokens is spent. The difference is taken
prompt by prompt.

Tokens are counted with the reference of `vllm_sparq.ops.sparq_decode`, on the query and the pages that the kernel gets,
which may differ from the kernel's own count by a token where rounding decides.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_sparq.benchmarks.quality.cells import CONFIDENCE, interval
from vllm_sparq.console import (
    DTYPES,
    UsageError,
    check_model,
    comma_names,
    comma_numbers,
    comma_shares,
    make_console,
    natural,
    place,
    positive,
)

BATCH = 25
"""Prompts that are answered together."""

DENSE = {"dense_below": 1 << 30}
"""Options of a read that leaves nothing out."""


@dataclass
class Count:
    """Tokens that were read, one number for each decode step, request, layer and KV head."""

    numbers: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.numbers) / len(self.numbers)

    def quantile(self, share: float) -> int:
        ordered = sorted(self.numbers)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    def watch(self, impl: Any) -> None:
        """Count what an attention layer reads, from when it is bound to its cache again on."""
        policy: Callable[[Any], Any] = impl._read_policy

        def counting(options: Any) -> Callable[..., None]:
            decode = policy(options)
            read = decode.keywords["read"]

            def run(query: Any, pages: Any, table: Any, lens: Any, *, scale: float, out: Any) -> None:
                self.numbers += tokens_read(query, pages, table, lens, read, scale)
                decode(query, pages, table, lens, scale=scale, out=out)

            return run

        impl._read_policy = counting


def tokens_read(query: Any, pages: Any, table: Any, lens: Any, read: Any, scale: float) -> list[int]:
    """Of every request and KV head of a call of `sparq_decode`."""
    from vllm_sparq.ops.dense_decode.reference import cached_tokens
    from vllm_sparq.ops.sparq_decode import reference

    found: list[int] = []
    for request, context_len in zip(query.float(), lens.tolist(), strict=False):
        blocks = table[len(found) // pages.data.shape[1]]
        for head, q in enumerate(request.unflatten(0, (pages.data.shape[1], -1))):
            if read.is_dense(context_len) or read.mass is None:
                found.append(context_len if read.is_dense(context_len) else read.n_selected(context_len))
                continue
            keys, _ = cached_tokens(pages, blocks, context_len, head)
            channels = reference.pick_channels(q, read.r)
            ranked_by = reference.ranking_keys(pages, blocks, keys, head)
            scores = reference.approximate_scores(q, ranked_by, channels, scale)
            positions = reference.positions_of(pages, blocks, context_len, head)
            found.append(len(reference.pick_tokens(scores, read, positions)))
    return found


class Curve:
    """One engine, in this process, that answers the same prompts with one read after the other."""

    def __init__(self, run: Any, shared: dict[str, Any]) -> None:
        from vllm_sparq.benchmarks.quality.engine import Worker

        self.shared, self.count = shared, Count()
        self.worker = Worker(self.method("start", {}), run)
        for impl in self.worker.impls:
            self.count.watch(impl)

    def method(self, name: str, options: dict[str, Any]) -> Any:
        from vllm_sparq.benchmarks.common.methods import Method

        return Method.named("sparq", {"dense_below": 0, **self.shared, **options})

    def point(
        self, name: str, options: dict[str, Any], examples: Sequence[Any], advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Scores of the examples and what was read for them, with these options."""
        from vllm_sparq.benchmarks.quality.evaluate import scored

        method = self.method(name, options)
        self.worker.read(method)
        self.count.numbers.clear()
        scores = []
        for first in range(0, len(examples), BATCH):
            batch = list(examples[first : first + BATCH])
            outputs = self.worker.answer(batch)
            scores += [100 * scored(one, output)["score"] for one, output in zip(batch, outputs, strict=True)]
            advance(len(batch))
        low, high = interval(scores)
        return dict(
            bench="mass_curve",
            task=examples[0].task,
            length=examples[0].length,
            read=name,
            options=method.options,
            n=len(scores),
            scores=scores,
            score=sum(scores) / len(scores),
            low=low,
            high=high,
            tokens_read=self.count.mean,
            tokens_read_p10=self.count.quantile(0.1),
            tokens_read_p90=self.count.quantile(0.9),
        )


def pair(curve: Curve, mass: float, examples: Sequence[Any], advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """A mass, and the fixed k that reads as many tokens on average, with the difference of the two."""
    adaptive = curve.point(f"mass {mass:g}", {"mass": mass, "compression": 1.0}, examples, advance)
    k = max(1, round(adaptive["tokens_read"]) - 1)  # the current token is counted
    fixed = curve.point(f"k = {k}", {"k": k}, examples, advance)
    differences = [a - b for a, b in zip(adaptive["scores"], fixed["scores"], strict=True)]
    adaptive["difference"] = sum(differences) / len(differences)
    adaptive["difference_low"], adaptive["difference_high"] = interval(differences)
    adaptive["beside"] = fixed["read"]
    return [adaptive, fixed]


def table(records: Sequence[dict[str, Any]]) -> Any:
    """A row per read; each mass is followed by the fixed k beside which it is measured."""
    from rich import box
    from rich.table import Table

    title = f"Points of 100 with {CONFIDENCE:.0%} bootstrap intervals; tokens of a step, layer and KV head"
    view = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("task", "length", "read", "tokens read", "10% .. 90%", "score", "mass - fixed k"):
        view.add_column(name, justify="left" if name in ("task", "read") else "right")
    before = None
    for record in records:
        cell = record["task"], f"{record['length']:,}"
        if before not in (None, cell):
            view.add_section()
        difference = ""
        if "difference" in record:
            ends = f"{record['difference_low']:+.1f} .. {record['difference_high']:+.1f}"
            difference = f"{record['difference']:+.1f} ({ends})"
        view.add_row(
            *(("", "") if cell == before else cell),
            record["read"],
            f"{record['tokens_read']:.1f}",
            f"{record['tokens_read_p10']} .. {record['tokens_read_p90']}",
            f"{record['score']:.1f} ({record['low']:.1f} .. {record['high']:.1f})",
            difference,
        )
        before = cell
    return view


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research mass`."""
    parser.description = __doc__
    parser.add_argument("--model", type=place, help="a model folder (default: the bundled model)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="element type of the model (default: bfloat16)"
    )
    parser.add_argument("--mass", type=comma_shares, default="0.8,0.9,0.95,0.99", help="shares to try")
    parser.add_argument("--tasks", type=comma_names, default=["repetition", "recall"], help="as of vllm-sparq eval")
    parser.add_argument("--lengths", type=comma_numbers, default=[1024], help="prompt tokens (default: 1024)")
    parser.add_argument("--n", type=positive, default=50, help="prompts per task and length (default: 50)")
    parser.add_argument("--r", type=positive, default=8, help="channels that rank the tokens (default: 8)")
    parser.add_argument("--local", type=natural, default=8, help="newest tokens that any read holds (default: 8)")
    parser.add_argument("--min-k", type=positive, default=8, help="tokens that a mass reads at least (default: 8)")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--out", type=place, metavar="FILE", help="add a JSON line for each row of the table")


def check_scores(tasks: Sequence[str]) -> None:
    """Refuse tasks that are measured in bits: the table is of points, of which more are better.

    Raises:
        UsageError: the first of them.
    """
    from vllm_sparq.benchmarks.quality.prompts import MEASURED_TASKS
    from vllm_sparq.benchmarks.tasks.metrics import MEASURED

    for name in tasks:
        task, _, metric = name.partition(":")
        if task in MEASURED_TASKS or metric in MEASURED:
            raise UsageError(
                f"--tasks {name} is measured in bits, and this table is of points: name tasks that are answered, such "
                "as repetition, or use `vllm-sparq eval`"
            )


def main(args: argparse.Namespace) -> int:
    """Answer, count, print."""
    from rich.progress import Progress

    from vllm_sparq.benchmarks.common.lines import check_out
    from vllm_sparq.benchmarks.common.model_shape import ModelShape
    from vllm_sparq.benchmarks.common.records import append_records, provenance
    from vllm_sparq.benchmarks.quality.engine import Run
    from vllm_sparq.benchmarks.quality.prompts import Wanted, check_tasks
    from vllm_sparq.benchmarks.tiny_model import WEIGHTS

    check_out(args.out)
    console = make_console()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("TQDM_DISABLE", "1")
    run = Run(model=check_model(args.model or WEIGHTS), dtype=args.dtype)
    check_tasks(args.tasks)
    check_scores(args.tasks)
    wanted = Wanted(model=run.model, tasks=args.tasks, lengths=args.lengths, n=args.n, seed=args.seed)
    examples = wanted.examples(ModelShape.of(run.model, run.dtype).max_model_len)
    curve = Curve(run, {"r": args.r, "local": args.local, "min_k": args.min_k})
    about = {"model": run.model.name, "dtype": run.dtype, "seed": args.seed, **provenance()}
    records: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        records.extend(found)
        if args.out:
            append_records(args.out, [{**record, **about} for record in found])

    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(examples) * (1 + 2 * len(args.mass)))
        for task in args.tasks:
            for length in args.lengths:
                cell = [one for one in examples if (one.task, one.length) == (task, length)]
                progress.update(bar, description=f"{task} at {length:,}")
                keep([curve.point("all", DENSE, cell, lambda n: progress.advance(bar, n))])
                for mass in args.mass:
                    keep(pair(curve, mass, cell, lambda n: progress.advance(bar, n)))
    console.print(table(records))
    return 0
