"""What it costs that the requests of a batch have chosen different reads: `bench engine` with ``--choice``.

One engine. Batches whose requests all choose alike, an arm each, and one of all choices, request by request in turn,
decode in turns: every arm some steps, round after round, so that all see the same machine. A row of a mixed batch reads
what it reads in the others; what its step takes over their mean is the price of sorting rows by choice, and of an op of
its own for each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import CacheLayout
from vllm_sparq.benchmarks.common.engine_process import EngineProcess
from vllm_sparq.benchmarks.common.proof import WrongAttentionError
from vllm_sparq.benchmarks.common.records import append_records, case_key, provenance, recorded, skipped_note
from vllm_sparq.benchmarks.common.threads import engine_threads
from vllm_sparq.benchmarks.engine.cases import N_ANSWER, N_TAIL, Case, Engine, Model
from vllm_sparq.benchmarks.engine.requests import model_folder
from vllm_sparq.benchmarks.engine.turns import start
from vllm_sparq.config import NAMESPACE
from vllm_sparq.console import UsageError, json_object, make_console

OFF = "off"
"""The choice of a request that is read densely."""

OWN = "none"
"""In tables and records: a request that leaves all to its engine."""

MIXED = "mixed"
"""The arm of all choices."""

N_FIRST = 2
"""Steps of an arm that are not timed, after its batch has been put together."""


@dataclass(frozen=True, kw_only=True)
class MixedCase(Case):
    """A batch whose requests choose, one after the other; None leaves all to the engine."""

    choices: tuple[dict[str, Any] | str | None, ...]

    def asked(self, i: int) -> dict[str, Any] | None:
        """What the i-th request writes."""
        chosen = self.choices[i % len(self.choices)]
        return None if chosen is None else {NAMESPACE: chosen}

    @property
    def arms(self) -> dict[str, MixedCase]:
        """Name -> the batch: each choice alone, and this one."""
        alone = {
            name_of(one): MixedCase(context=self.context, batch=self.batch, choices=(one,)) for one in self.choices
        }
        return alone | {MIXED: self}


def choice(text: str) -> dict[str, Any] | str:
    """For argparse: ``off``, or options in JSON."""
    try:
        return OFF if text == OFF else json_object(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or the word {OFF}") from None


def name_of(chosen: dict[str, Any] | str | None) -> str:
    """For tables and records."""
    return OWN if chosen is None else chosen if isinstance(chosen, str) else json.dumps(chosen)


def check(choices: Sequence[dict[str, Any] | str], engine: Engine, model: Model) -> None:
    """That requests of this engine may choose so.

    Raises:
        UsageError: one may not, or changes nothing.
    """
    from vllm_sparq.attention_backends.choices import asked_for, chosen
    from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE, PagedEngine
    from vllm_sparq.reads import HeadShape

    assert engine.method.backend is not None
    paged = PagedEngine(
        backend=engine.method.backend.lower(),
        options=engine.method.parsed,
        block_size=engine.block_size or PREFERRED_BLOCK_SIZE,
    )
    shape = model.shape
    heads = HeadShape(head_size=shape.head_size, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads)
    for one in choices:
        try:
            found = chosen(paged, heads, asked_for({NAMESPACE: one}))
        except ValueError as error:
            raise UsageError(f"--choice {name_of(one)}: {error}") from None
        if found is None:
            raise UsageError(
                f"--choice {name_of(one)} is what engine {engine.name!r} does anyway: choose something else"
            )


def measure_case(case: MixedCase, engine: EngineProcess, *, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of each arm, in turns, and how much longer one of the mixed batch takes than it should.

    It should take the mean of the arms, each weighted by the rows that it has in the mixed batch.

    Raises:
        WrongAttentionError: layers do not know what requests have chosen.
    """
    seconds: dict[str, list[float]] = {name: [] for name in case.arms}
    for turn in range(rounds + 1):
        for name, arm in case.arms.items():
            engine.ask("prepare", arm)
            engine.ask("decode", N_FIRST)
            wanted, choosing = sum(arm.asked(i) is not None for i in range(arm.batch)), engine.ask("choosing")
            if choosing != wanted:
                raise WrongAttentionError(
                    f"{wanted} of {arm.batch} requests chose what is read, and {choosing} are read so"
                )
            measured = engine.ask("decode", steps)
            if turn:  # the first turn warms up
                seconds[name].append(statistics.median(measured.seconds))
    return record_of(case, seconds)


def record_of(case: MixedCase, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What is recorded of seconds a step: of each arm, a number a turn."""
    names = [name_of(case.choices[i % len(case.choices)]) for i in range(case.batch)]
    should = [statistics.fmean(seconds[name][turn] for name in names) for turn in range(len(seconds[MIXED]))]
    over = [mixed / alone - 1 for mixed, alone in zip(seconds[MIXED], should, strict=True)]
    return {
        **asdict(case),
        "choices": [name_of(one) for one in case.choices],
        "median_step_ms": {name: round(1e3 * statistics.median(found), 3) for name, found in seconds.items()},
        "overhead": round(statistics.median(over), 4),
        "least_overhead": round(min(over), 4),
        "most_overhead": round(max(over), 4),
    }


def key_of(case: MixedCase, engine: Engine, model: Model, max_context: int) -> str:
    """Of the record of one case."""
    layout = CacheLayout.of(
        engine.method, model.shape, max_model_len=max_context + N_TAIL, block_size=engine.block_size
    )
    fields = asdict(case) | model.fields | {"method": engine.name, "arguments": engine.arguments}
    return case_key("mixed", fields | layout.fields | engine_threads())


def measure(
    cases: Mapping[str, MixedCase],
    engine: Engine,
    model: Model,
    room: Case,
    *,
    rounds: int,
    steps: int,
    report: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The record of each case, by key.

    Raises:
        UsageError: the engine did not start.
        WrongAttentionError: it runs another attention than its method's.
    """
    with model_folder(model) as folder, contextlib.ExitStack() as stack:
        running, about = start(stack, [engine], model, folder, None, room, report)
        for key, case in cases.items():
            report(f"{case.context} tokens of context, batch {case.batch}")
            found = measure_case(case, running[engine.name], rounds=rounds, steps=steps)
            head = {"bench": "mixed", "key": key, "model": model.name, "method": engine.name}
            yield {**head, **about[engine.name], **found}


def main(args: argparse.Namespace, found: list[Engine], model: Model) -> int:
    """Measure, print the table, write the lines."""
    console = make_console()
    if len(found) != 1:
        raise UsageError(f"--choice is for requests of one engine, not of {len(found)}: name one method or --options")
    if args.input_len is not None or args.text is not None:
        raise UsageError("--choice measures steps that share a prompt: leave --input-len and --text out")
    (engine,), choices = found, (None, *args.choice)
    check(args.choice, engine, model)
    if min(args.batch) < len(choices):
        raise UsageError(
            f"--batch {min(args.batch)} has no request for each of {len(choices)} choices, the engine's own among "
            f"them: use {len(choices)} or more"
        )
    if N_FIRST + args.steps >= N_ANSWER:
        raise UsageError(
            f"--steps {args.steps} is more than a request has tokens for: use {N_ANSWER - N_FIRST - 1} or less"
        )
    model.check_length("--context", max(args.context), N_TAIL)
    room = Case(context=max(args.context), batch=max(args.batch))
    cases = [
        MixedCase(context=context, batch=batch, choices=choices) for context in args.context for batch in args.batch
    ]
    by_key = {key_of(case, engine, model, room.context): case for case in cases}
    records = recorded(args.out, by_key, again=args.again)
    old, todo = list(records.values()), {key: case for key, case in by_key.items() if key not in records}
    try:
        with console.status("") as status:
            new = measure(
                todo,
                engine,
                model,
                room,
                rounds=args.rounds,
                steps=args.steps,
                report=lambda line: status.update(f"{line} ..."),
            )
            for record in new if todo else ():
                records[record["key"]] = record | provenance()
                if args.out:
                    append_records(args.out, [records[record["key"]]])
    except WrongAttentionError as error:
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    console.print(table([records[key] for key in by_key]))
    if old:
        console.print(skipped_note(old), highlight=False, soft_wrap=True)
    return 0


def table(records: Sequence[Mapping[str, Any]]) -> Any:
    """A line per case: a step of each choice alone, of all mixed, and what that is more."""
    from rich.table import Table

    first = records[0]
    view = Table(title=f"Time of a step by what requests choose, {first['method']}, {first['model']}")
    for column in ("context", "batch", *(f"{name}, ms" for name in first["median_step_ms"]), "overhead of mixing"):
        view.add_column(column, justify="right")
    for record in records:
        times = [f"{ms:.1f}" for ms in record["median_step_ms"].values()]
        spread = f" ({record['least_overhead']:+.1%} .. {record['most_overhead']:+.1%})"
        view.add_row(f"{record['context']:,}", str(record["batch"]), *times, f"{record['overhead']:+.1%}{spread}")
    return view
