"""Find the setting for a model, a text and a machine: fast, small, and no worse than the user allows.

    vllm-sparq tune --model MODEL --text my_documents/ --max-loss 0.01

Optuna searches `tune_space.SPACE` for settings that no other beats in time per output token, KV bytes kept and loss at
once. The default is measured first. Time is taken in turns with vLLM's dense attention; loss is what the text costs in
bits per byte beside dense, forced token by token as it would be served, and what generated needles cost in points.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.lines import check_folder, make_folder, mend, replace_text
from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.optional import optional
from vllm_sparq.benchmarks.common.records import origin_of, provenance
from vllm_sparq.benchmarks.quality import evaluate as quality
from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape
from vllm_sparq.benchmarks.quality.engine import Run
from vllm_sparq.benchmarks.quality.prompts import TEXT, Wanted, read_text, text_windows
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tuning.measure import Engines, Measured, answers_of, measure, times_in_turns
from vllm_sparq.benchmarks.tuning.space import DEFAULT, Workload, draw, method_of, options_of, starting_points
from vllm_sparq.console import UsageError, check_model, make_console, place, positive, real_number

N_SCORED = 128
"""Tokens at the end of each window that are forced; the context before them is read."""

JOURNAL = "search.journal"
"""The search, in its folder."""

TAIL = 64  # more than MIN_TURNS + 2 turns of STEPS
"""Room after the context for the tokens whose time is taken."""

RESERVE = 0.2
"""Share of the time limit that is kept for taking the best settings' time once more."""

N_CONFIRMED = 3
"""How many they are, beside the default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq tune`."""
    quality.add_model_arguments(parser)
    parser.add_argument("--text", type=place, help="text file or folder that loss is measured on (default: the corpus)")
    parser.add_argument(
        "--max-loss",
        type=real_number(least=0),
        default=0.01,
        help="bits per byte, and share of needles (default: 0.01)",
    )
    parser.add_argument(
        "--context", type=positive, help="tokens of a request (default: half the model's, 8192 at most)"
    )
    parser.add_argument("--batch", type=positive, default=4, help="requests at a time (default: 4)")
    parser.add_argument(
        "--time-limit", type=real_number(least=0), default=540, metavar="SECONDS", help="of this run (default: 540)"
    )
    parser.add_argument("--trials", type=positive, help="settings, earlier runs included (default: as many as fit)")
    parser.add_argument("--n", type=positive, default=16, help="windows of text, and needles (default: 16)")
    parser.add_argument(
        "--engines", type=positive, default=2, help="kept running beside dense's, if memory allows (default: 2)"
    )
    default = Path.home() / ".cache" / "vllm-sparq" / "tune"
    parser.add_argument(
        "--out", type=place, default=default, metavar="FOLDER", help=f"the search, kept (default: {default})"
    )
    parser.epilog = """\
A run that was stopped goes on where it was, for the same model, text, context, batch and seed, on the same machine and
with the same versions.

examples:
  vllm-sparq tune                                              the bundled model, in under ten minutes
  vllm-sparq tune --model M --text docs/ --max-loss 0.005 --context 16384 --batch 8 --time-limit 7200
"""


def main(args: argparse.Namespace) -> int:
    """Search, show, choose."""
    check_folder(args.out, files=[JOURNAL])
    started = time.monotonic()
    console = make_console()
    workload, run, examples = prepare(args)
    n_windows = sum(example.task == TEXT for example in examples)
    console.print(
        f"{n_windows} windows of text and {len(examples) - n_windows} needles of {workload.context:,} tokens; "
        f"time at batch {workload.batch}"
    )
    study = open_study(args, run, workload, examples)
    known = measured(study)
    deadline = started + args.time_limit * (1 - RESERVE)
    wanted = len(known) < (args.trials or len(known) + 1)
    if time.monotonic() < deadline and wanted:
        with (
            console.status("") as status,
            Engines(run, args.engines, lambda line: status.update(f"{line} ...")) as engines,
        ):
            baseline = dense_scores(study, engines, examples)
            search(args, study, engines, workload, examples, baseline, deadline, console)
            status.update("taking the time of the best settings once more ...")
            confirm(console, study, engines, workload, args.max_loss)
    found = measured(study)
    if not found:
        raise UsageError(f"--time-limit {args.time_limit:g} was over before one setting was measured: give more")
    write(args.out, study.study_name, found)
    return show(console, found, args.max_loss)


def prepare(args: argparse.Namespace) -> tuple[Workload, Run, list[Example]]:
    """What the arguments mean.

    Raises:
        UsageError: a model, a text or numbers that cannot be used.
    """
    args.model = check_model(args.model)
    shape = CacheShape.of(args.model, args.dtype)
    limit = args.engine_args.get("max_model_len") or shape.max_model_len
    context = args.context or min(8192, limit // 2)
    if not 2 * N_SCORED < context <= limit - TAIL:
        raise UsageError(
            f"--context {context} is not usable: it must lie between {2 * N_SCORED + 1} and {limit - TAIL} tokens"
        )
    text = read_text(args.text) if args.text else None
    wanted = Wanted(model=args.model, tasks=(), lengths=(), n=args.n, seed=args.seed, text=text)
    ids = wanted.text_ids
    n = min(args.n, len(ids) // context)
    if n < 1:
        raise UsageError(
            f"the text has {len(ids):,} tokens, a window has {context:,}: give more text or less --context"
        )
    windows = text_windows(wanted.tokenizer, ids, length=context, n=n, n_scored=N_SCORED)
    needles = [wanted.generated("needle", context - TAIL, i) for i in range(args.n)]
    # Pages of any format are below twice the model's type; the windows go through in as many batches as it takes.
    room = 2 * shape.dense_bytes * (max(args.batch, 8) + 1) * (context + 256)
    engine_args = {"kv_cache_memory_bytes": max(room, 1 << 27), **args.engine_args}
    run = Run(model=args.model, dtype=args.dtype, engine_args=engine_args)
    return Workload(shape=shape, context=context, batch=args.batch), run, [*windows, *needles]


def open_study(args: argparse.Namespace, run: Run, workload: Workload, examples: Sequence[Example]) -> Any:
    """A new search, or the one that was begun for the same model, examples and workload, here and with this code."""
    from vllm_sparq.benchmarks.common.fingerprint import fingerprint
    from vllm_sparq.benchmarks.quality.store import digest

    optuna, journal = (optional(name, "the search") for name in ("optuna", "optuna.storages.journal"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # conditional spaces are one
    make_folder(args.out)
    mend(args.out / JOURNAL)  # of a run that was killed while it wrote
    prompts = [(example.prompt, example.prompt_ids) for example in examples]
    where = workload.context, workload.batch, origin_of(provenance())  # half of what is measured is time
    identity = fingerprint(run.model), run.dtype, run.engine_args, *where, args.seed, prompts
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal.JournalFileBackend(str(args.out / JOURNAL))),
        study_name=digest(*identity),
        directions=["minimize"] * 3,
        sampler=optuna.samplers.TPESampler(seed=args.seed, multivariate=True, group=True, n_startup_trials=8),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,), deepcopy=False):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # a run that was killed left it
        study.enqueue_trial(trial.params)
    if not study.get_trials(deepcopy=False):
        for values in starting_points(workload):
            study.enqueue_trial(values)
    return study


def dense_scores(study: Any, engines: Engines, examples: Sequence[Example]) -> dict[str, float]:
    """What dense scores on each task; asked once a search."""
    if DENSE not in study.user_attrs:
        engines.report("measuring dense")
        study.set_user_attr(DENSE, answers_of(engines.dense, examples))
    return dict(study.user_attrs[DENSE])


def search(
    args: argparse.Namespace,
    study: Any,
    engines: Engines,
    workload: Workload,
    examples: Sequence[Example],
    baseline: dict[str, float],
    deadline: float,
    console: Any,
) -> None:
    """The default, then one setting after the other, until the time or the trials are over."""
    slowest = 0.0
    while time.monotonic() + slowest < deadline:
        known = measured(study)
        if args.trials is not None and len(known) >= args.trials:
            return
        begin = time.monotonic()
        is_default = not any(one.options == DEFAULT for one in known)
        if is_default:
            trial, options = None, dict(DEFAULT)
        else:
            trial = study.ask()
            options = options_of(draw(trial.suggest_categorical, workload), workload)
        engines.report(f"setting {len(known) + 1}: {json.dumps(options)}")
        before = next((one for one in known if one.options == options), None)
        found = before or measure(engines, method_of(options, json.dumps(options)), workload, examples, baseline)
        if trial is None:
            study.set_user_attr("default", found.record())
        else:
            trial.set_user_attr("measured", found.record())
            study.tell(trial, [found.time, found.held, found.loss])
        if before is None:  # a setting that is drawn again is known
            slowest = max(slowest, time.monotonic() - begin)
            console.print(describe(found, "the default" if is_default else json.dumps(options)))


def measured(study: Any) -> list[Measured]:
    """What is known: the default first, every setting once."""
    state = optional("optuna.trial", "the search").TrialState
    complete = study.get_trials(states=(state.COMPLETE,), deepcopy=False)
    records = [study.user_attrs.get("default"), *(trial.user_attrs["measured"] for trial in complete)]
    found: dict[str, Measured] = {}
    for record in filter(None, records):
        values = {name: value for name, value in record.items() if name != "loss"}
        name = json.dumps(values["options"], sort_keys=True)
        if name in study.user_attrs.get("confirmed", {}):
            values["time"], values["tpot_ms"] = study.user_attrs["confirmed"][name]
        found.setdefault(name, Measured(**values))
    return list(found.values())


def pareto(found: Sequence[Measured]) -> list[Measured]:
    """Settings that no other beats: as good in time, bytes and loss, and better in one. Fastest first."""

    def beaten(one: Measured) -> bool:
        mine = one.time, one.held, one.loss
        theirs = [(other.time, other.held, other.loss) for other in found]
        return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in theirs)

    return sorted((one for one in found if not beaten(one)), key=lambda one: one.time)


def choose(found: Sequence[Measured], max_loss: float) -> Measured | None:
    """The fastest setting within the loss; None if there is none."""
    return min((one for one in found if one.loss <= max_loss), key=lambda one: (one.time, one.held), default=None)


def confirm(console: Any, study: Any, engines: Engines, workload: Workload, max_loss: float) -> None:
    """Take the time of the default and of the fastest settings within the loss again, and keep that.

    The fastest of many noisy times is too good to be true; its second time is not.
    """
    found = measured(study)
    default = [one for one in found if one.options == DEFAULT]
    others = [one for one in found if one.options != DEFAULT and one.loss <= max_loss]
    times = dict(study.user_attrs.get("confirmed", {}))
    for one in [*default, *sorted(others, key=lambda one: one.time)[:N_CONFIRMED]]:
        name = json.dumps(one.options, sort_keys=True)
        engine = engines.for_method(method_of(one.options, name))
        _, (ratio, seconds) = times_in_turns([engines.dense, engine], workload)
        times[name] = [ratio, 1e3 * seconds]
        console.print(
            f"once more: {ratio:.2f}x dense's time, {json.dumps(one.options) if one.options else 'the default'}"
        )
    study.set_user_attr("confirmed", times)


def describe(one: Measured, name: str) -> str:
    """A setting in a line."""
    return (
        f"{name}: {one.tpot_ms:.1f} ms, {one.time:.2f}x dense's time, keeps {one.held:.2f}x, reads {one.moved:.2f}x, "
        f"{one.bits:+.4f} bits per byte, {points(one)} points of needles"
    )


def points(one: Measured) -> str:
    """Of needles, beside dense's, of 100."""
    return f"{0.0 - 100 * one.needles:+.1f}"


def show(console: Any, found: Sequence[Measured], max_loss: float) -> int:
    """The Pareto set, the choice and what it gains and costs; 1 if nothing is within the loss."""
    from rich import box
    from rich.table import Table

    view = Table(title=f"Not beaten in time, bytes and loss at once, of {len(found)} settings", box=box.SIMPLE_HEAD)
    for column in ("time", "kept", "read", "bits per byte", "needles", "options"):
        view.add_column(column, justify="left" if column == "options" else "right")
    for one in pareto(found):
        numbers = f"{one.time:.2f}x", f"{one.held:.2f}x", f"{one.moved:.2f}x", f"{one.bits:+.4f}", points(one)
        view.add_row(*numbers, json.dumps(one.options) if one.options else "the default", style=None)
    console.print(view)
    default = next((one for one in found if one.options == DEFAULT), None)
    if default is not None:
        console.print(describe(default, "The default"))
    chosen = choose(found, max_loss)
    if chosen is None:
        least = min(found, key=lambda one: one.loss)
        console.print(
            f"No setting loses {max_loss:g} or less; the least is {least.loss:.4f}. Raise --max-loss, or stay dense."
        )
        return 1
    if default is not None:
        as_good = [one for one in found if one.time <= default.time and one.loss <= default.loss]
        console.print(
            f"At least as fast as the default, losing no more: {len(as_good) - 1} of {len(found) - 1} settings."
        )
    gain = f"{1 / chosen.time:.2f} times as fast" if chosen.time <= 1 else f"slower: {chosen.time:.2f} times the time"
    console.print(f"Beside dense: {gain}, {1 / chosen.held:.2f} times the tokens in the same memory.")
    console.print(f"It costs {chosen.bits:+.4f} bits per byte of the text and {points(chosen)} points of needles.\n")
    line = json.dumps({"sparq": chosen.options})
    console.print(
        f"--attention-backend sparq --additional-config '{line}'", soft_wrap=True, markup=False, highlight=False
    )
    return 0


def write(folder: Path, name: str, found: Sequence[Measured]) -> None:
    """All settings of a search, in a file of its own."""
    best = {id(one) for one in pareto(found)}
    lines = [json.dumps({"bench": "tune", **one.record(), "pareto": id(one) in best}) for one in found]
    replace_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
