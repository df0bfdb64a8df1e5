"""Time per output token through the engine: each method against vLLM's own attention and against none at all.

    vllm-sparq bench engine --methods sparq,kivi,sparq+int4 --context 32768 --batch 1,4,8

The engines, on one dummy-weight model of a real model's shape or on a model of yours, each in a process of its own,
decode in turns: one decodes while the others wait, round after round, so that all see the same machine. One engine
skips the attention op of its decode steps; its time is what no attention kernel can beat, and dense time over its time
is the Amdahl bound of any speed-up. Every engine says which attention classes it runs, or nothing is measured.

All requests of a batch share one prompt through prefix caching, so the context is prefilled once. The attention of that
prefill is skipped too, everywhere alike: K and V are written, and what they hold does not change how long a read takes.
With ``--text`` each has a prompt of its own, read as it should be: how many drafts are accepted depends on it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.engine_process import EngineProcess
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, speed_note
from vllm_sparq.benchmarks.common.records import append_records, provenance, recorded, skipped_note
from vllm_sparq.benchmarks.engine import mixed
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import (
    DEFAULT_OPTIONS,
    N_ANSWER,
    N_BATCHED,
    N_TAIL,
    SKIPPED,
    Case,
    Engine,
    Model,
    engines,
    key_of,
)
from vllm_sparq.benchmarks.engine.drafts import Turn, acceptance, tenths
from vllm_sparq.benchmarks.engine.turns import start
from vllm_sparq.console import (
    UsageError,
    comma_names,
    comma_numbers,
    json_object,
    make_console,
    place,
    positive,
    real_number,
)

EPILOG = """\
With --context, decode steps of all engines in turns, dense and "no attention" always among them. With --input-len,
whole requests, one engine after the other: a latency for each --batch, and the throughput of --num-prompts. With
--choice, one engine, whose requests say for themselves what is read of them: a step of a batch that mixes these choices
and the engine's own, beside batches that choose alike.

examples:
  vllm-sparq bench engine --methods sparq,kivi,sparq+int4 --context 8192,32768 --batch 1,4,8 --out engine.jsonl
  vllm-sparq bench engine --model M --methods sparq,kivi,h2o --input-len 8192 --output-len 128
  vllm-sparq bench engine --model M --text docs/ --context 8192 --batch 4 --options '{"lossless": true}'
  vllm-sparq bench engine --context 16384 --batch 8,64 --choice off --choice '{"k": 512}'
  vllm-sparq bench engine --methods h2o --input-len 1000 --output-len 1500 --num-prompts 16 --kv-cache-mib 48
"""


VERIFIED_STEPS = 32
"""Steps after those that are timed: of an engine that may draft, to see how many drafts are accepted."""

DRAFTS = ("tokens a step", "drafts accepted, by position")
"""Columns of engines that draft."""


def measure(
    cases: list[Case],
    chosen: list[Engine],
    *,
    model: Model,
    text: Sequence[int] | None = None,
    max_context: int,
    rounds: int,
    steps: int,
    report: Callable[[str], None],
) -> Iterator[list[dict[str, Any]]]:
    """All cases, with the engines in turns: yields the records of a case, one a method.

    Args:
        cases: contexts and batches.
        chosen: the engines; dense and no attention are among them.
        model: what they run.
        text: tokens that prompts are pieces of; None for one random prompt that all requests share.
        max_context: tokens of context that the engines have room for.
        rounds: turns of each engine per case.
        steps: decode steps per turn.
        report: called with a line of text when something has been done.
    """
    room = Case(context=max_context, batch=max(c.batch for c in cases))
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = model.folder or Path(temporary)
        if model.folder is None:
            (folder / "config.json").write_text(json.dumps(model.config))
        running, about = start(stack, chosen, model, folder, text, room, report)
        for case in cases:
            report(f"{case.context} tokens of context, batch {case.batch}")
            measured = measure_case(case, running, rounds=rounds, steps=steps)
            keys = {engine.name: key_of(case, engine, model, max_context, text) for engine in chosen}
            yield [
                {"bench": "engine", "key": keys[r["method"]], "model": model.name, **about[r["method"]], **r}
                for r in measured
            ]


def measure_case(case: Case, engines: Mapping[str, EngineProcess], *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time per output token of each engine, in turns.

    That of a step is the median of all; where drafts are verified, the median of turns counts.
    """
    turns = {name: Turn() for name in engines}
    for engine in engines.values():
        engine.ask("prepare", case)
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            measured = engine.ask("decode", steps)
            if turn:  # the first turn warms up
                turns[name].add(measured, case.batch)
    for name, engine in engines.items():
        turns[name].verified = engine.ask("verified", VERIFIED_STEPS)
    dense_ms, skipped_ms = (_median_tpot_ms(turns[name], case) for name in (DENSE, SKIPPED))
    return [_record(name, case, turn, dense_ms=dense_ms, bound=dense_ms / skipped_ms) for name, turn in turns.items()]


def _median_tpot_ms(turn: Turn, case: Case) -> float:
    return 1e3 * statistics.median(turn.times_per_token(case.batch))


def _record(name: str, case: Case, turn: Turn, *, dense_ms: float, bound: float) -> dict[str, Any]:
    ms, (first, last) = _median_tpot_ms(turn, case), tenths(turn.times_per_token(case.batch))
    record = {
        "method": name,
        **asdict(case),
        "median_tpot_ms": round(ms, 3),
        "p10_tpot_ms": round(1e3 * first, 3),
        "p90_tpot_ms": round(1e3 * last, 3),
        "speedup_vs_vllm": round(dense_ms / ms, 3),
        "amdahl_bound": round(bound, 3),
        "share_of_bound": round(dense_ms / ms / bound, 3),
    }
    if turn.verified:
        record |= {
            "tokens_per_step": round(turn.tokens_per_step(case.batch), 3),
            "acceptance": acceptance(turn.verified),
        }
    return record


def check_steps(rounds: int, steps: int, chosen: Sequence[Engine], n_unshared: int = 0) -> None:
    """Refuse more steps than a request has tokens for: the last ones would decode nothing.

    Args:
        rounds: turns that are timed; one before them warms up.
        steps: of each turn.
        chosen: the engines.
        n_unshared: prompt tokens of a batch where each request has its own: the first decode while the last are read.

    Raises:
        UsageError: they are too many.
    """
    drafts = max((e.method.parsed.drafts for e in chosen if e.method.backend and e.method.parsed.lossless), default=0)
    # The first token is decoded before, and a step gives a token and every draft that is taken.
    most = (N_ANSWER - 1) // (1 + drafts) - n_unshared // N_BATCHED - (VERIFIED_STEPS if drafts else 0)
    if (rounds + 1) * steps > most:
        each = f" of up to {1 + drafts} tokens" if drafts else ""
        raise UsageError(
            f"--rounds {rounds} and --steps {steps} are {(rounds + 1) * steps:,} steps{each} with the turn that warms "
            f"up, and a request has room for {most}: ask for fewer rounds or steps, or a smaller batch"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq bench engine`."""
    parser.epilog = EPILOG
    parser.add_argument("--context", type=comma_numbers, default=[32768], help="tokens of context, comma-separated")
    parser.add_argument("--batch", type=comma_numbers, default=[1, 4], help="requests at a time, comma-separated")
    parser.add_argument(
        "--methods", type=comma_names, default=[], metavar="M,...", help="beside dense, such as sparq,kivi,sparq+int4"
    )
    parser.add_argument(
        "--model", type=place, help="a model folder (default: the shape of Llama-3.2-1B, dummy weights)"
    )
    parser.add_argument("--layers", type=positive, default=4, help="of the default model (default 4 of the real 16)")
    parser.add_argument(
        "--options",
        type=json_object,
        action="append",
        metavar="JSON",
        help='sparq options; may be repeated, an engine each (default without --methods: {"r": 16, "k": 128})',
    )
    parser.add_argument(
        "--text", type=place, help="file or folder that prompts are cut from, one each (default: one, of random tokens)"
    )
    parser.add_argument(
        "--acceptance",
        type=real_number(least=0, most=1),
        metavar="SHARE",
        help="of the drafts of lossless engines, whatever the model says: dummy weights agree with none",
    )
    parser.add_argument(
        "--choice",
        type=mixed.choice,
        action="append",
        metavar="JSON",
        help="what a request sets for itself, options or off; may be repeated: batches of all, beside batches of each",
    )
    whole = parser.add_argument_group("whole requests, by `vllm bench latency` and `vllm bench throughput`")
    whole.add_argument("--input-len", type=positive, metavar="TOKENS", help="of a prompt; measures requests, not steps")
    whole.add_argument("--output-len", type=positive, default=128, metavar="TOKENS", help="of an answer (default 128)")
    whole.add_argument("--num-prompts", type=positive, default=16, metavar="N", help="of the throughput (default 16)")
    whole.add_argument("--kv-cache-mib", type=positive, help="KV cache of each engine (default: what vLLM takes)")
    parser.add_argument(
        "--block-size", type=positive, metavar="N", help="tokens per block of our backends (default: theirs)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each engine per case (default 5)")
    parser.add_argument("--steps", type=positive, default=8, help="decode steps per turn (default 8)")
    parser.add_argument("--out", type=place, help="append one JSON line per case and method to this file")
    parser.add_argument("--again", action="store_true", help="measure cases that --out holds already")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the lines."""
    check_out(args.out)
    console = make_console()
    model = Model.of(args.model, args.layers)
    options = args.options or ([] if args.methods else [DEFAULT_OPTIONS])
    chosen = engines(args.methods, options, args.block_size, args.acceptance)
    if args.choice:
        return mixed.main(args, [engine for engine in chosen if engine.method.backend is not None], model)
    if args.input_len is not None:
        return requests_bench.main(args, [engine.method for engine in chosen if not engine.skip_attention], model)
    evicts = any(one.method.backend and one.method.parsed.retention != "all" for one in chosen)
    n_unshared = max(args.context) * max(args.batch) if evicts or args.text else 0
    check_steps(args.rounds, args.steps, chosen, n_unshared)
    model.check_length("--context", max(args.context), N_TAIL)
    cases = [Case(context=context, batch=batch) for context in args.context for batch in args.batch]
    max_context = max(args.context)
    text = None if args.text is None else model.tokens_of(args.text, max_context * max(args.batch))
    keys = {case: [key_of(case, engine, model, max_context, text) for engine in chosen] for case in cases}
    known = recorded(args.out, [key for case in cases for key in keys[case]], again=args.again)
    todo = [case for case in cases if not all(key in known for key in keys[case])]
    records: list[dict[str, Any]] = []
    try:
        with console.status("") as status:
            measured = measure(
                todo,
                chosen,
                model=model,
                text=text,
                max_context=max_context,
                rounds=args.rounds,
                steps=args.steps,
                report=lambda line: status.update(f"{line} ..."),
            )
            for new in measured if todo else ():
                if args.out:
                    append_records(args.out, [{**record, **provenance()} for record in new])
                records += new
    except WrongAttentionError as error:
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    old = [known[key] for case in cases if case not in todo for key in keys[case]]
    console.print(table(old + records))
    if old:
        console.print(
            f"{len(cases) - len(todo)} of {len(cases)} cases: {skipped_note(old)}", highlight=False, soft_wrap=True
        )
    return 0


def table(records: list[dict[str, Any]]) -> Any:
    """A line per case and method: its time, its speed-up, and how much of the possible speed-up that is."""
    from rich.table import Table

    view = Table(title=f"Time per output token, {records[0]['model']}, {records[0]['threads']} threads")
    view.add_column("context", justify="right")
    view.add_column("batch", justify="right")
    view.add_column("method")
    drafting = any("acceptance" in record for record in records)
    for column in ("ms", "p10 .. p90", "speed-up", "of the bound", *(DRAFTS if drafting else ())):
        view.add_column(column, justify="right")
    for i, record in enumerate(records):
        if i and record["method"] == DENSE:
            view.add_section()
        view.add_row(
            f"{record['context']:,}",
            str(record["batch"]),
            record["method"],
            f"{record['median_tpot_ms']:.1f}",
            f"{record['p10_tpot_ms']:.1f} .. {record['p90_tpot_ms']:.1f}",
            "" if record["method"] == SKIPPED else speed_note(record["speedup_vs_vllm"]),
            f"{record['share_of_bound']:.0%}",
            *([_tokens(record), _accepted(record)] if drafting else ()),
        )
    return view


def _tokens(record: Mapping[str, Any]) -> str:
    return f"{record['tokens_per_step']:.2f}" if "tokens_per_step" in record else ""


def _accepted(record: Mapping[str, Any]) -> str:
    return " ".join(f"{share:.2f}" for share in record.get("acceptance", ()))
