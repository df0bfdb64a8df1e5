"""`vllm-sparq bench ray`: offline generation on a fixed pool of replicas, dense and compressed, with proofs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.cluster import prompts
from vllm_sparq.benchmarks.cluster.answers import Answers
from vllm_sparq.benchmarks.cluster.case import Measurement, code_of
from vllm_sparq.benchmarks.cluster.prompts import Prompt, Source, Survey
from vllm_sparq.benchmarks.cluster.replicas import (
    Pool,
    check_address,
    check_cores,
    cluster,
    engine_arguments,
    stderr_to,
    unpacked,
    with_options,
)
from vllm_sparq.benchmarks.cluster.summary import summary, table
from vllm_sparq.benchmarks.common.lines import check_folder, check_out, make_folder
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, with_dense
from vllm_sparq.benchmarks.common.records import append_records, read_records, recorded, skipped_note
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import (
    UsageError,
    check_model,
    comma_names,
    json_object,
    llm_arguments,
    make_console,
    natural,
    place,
    positive,
    real_number,
)

RUNNERS = ("data", "actors")

MAX_BATCH = 32

EPILOG = """\
Answers are Parquet shards in OUT/METHOD: id, text, token_ids, lengths, times, and the replica and the attention class
that made each row. Run the same command again after a kill: rows on disk are kept, the rest is done, none twice. Other
settings, code or machines need another OUT, since a rate is one of rows that share them. A replica that dies is started
again and its batches are repeated. If a replica runs another attention than its method's, the run fails.

One machine is enough: without --address, Ray is started for the run and stopped after it. Nodes of a cluster need the
model at the same path, and vLLM; where they lack this plugin, --ship brings a wheel of it.

examples:
  vllm-sparq bench ray --methods dense,sparq --replicas 2
  vllm-sparq bench ray --model M --data prompts.jsonl --methods sparq --replicas 8 --address ray://head:10001
  vllm-sparq bench ray --runner actors --methods int4 --replicas 2 --record ray.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A row that has no answer after all retries."""

    id: str
    error: str


class Incomplete(RuntimeError):
    """Rows without an answer are left."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq bench ray`."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    add("--methods", type=comma_names, default=["sparq"], metavar="M,...", help="beside dense (default: sparq)")
    add("--replicas", type=positive, default=2, help="engines that work at the same time (default: 2)")
    add("--address", help="of a Ray cluster: ray://HOST:10001, HOST:6379 or auto (default: this machine)")
    add("--runner", choices=RUNNERS, help="Ray Data LLM or plain actors (default: data; actors through ray://)")
    add(
        "--data",
        type=place,
        metavar="FILE",
        help=".jsonl or .parquet with a column prompt; id, max_tokens, seed if wanted",
    )
    add("--n", type=positive, default=64, help="prompts to generate without --data (default: 64)")
    add("--input-len", type=positive, default=512, metavar="TOKENS", help="of a generated prompt (default: 512)")
    add("--output-len", type=positive, default=32, metavar="TOKENS", help="at most, of an answer (default: 32)")
    add("--ignore-eos", action="store_true", help="answers have exactly that length")
    add("--temperature", type=real_number(least=0), default=0.0, help="of sampling (default: 0, greedy)")
    add("--seed", type=natural, default=0, help="of generated prompts and of sampling; row i gets SEED + i")
    add("--out", type=place, default=Path("ray-answers"), metavar="FOLDER", help="answers (default: ray-answers)")
    add("--record", type=place, metavar="FILE", help="append one JSON line per method")
    add("--again", action="store_true", help="measure what --record holds already; needs a new --out")
    add("--cpus", type=real_number(least=0), default=1, help="logical CPUs that a replica reserves (default: 1)")
    add("--gpus", type=real_number(least=0), default=0, help="GPUs that a replica reserves (default: 0)")
    add(
        "--kv-cache-mib",
        type=positive,
        help="KV cache of a replica (default: 512 on a CPU, vLLM's own choice on a GPU)",
    )
    add("--engine-args", type=llm_arguments, default={}, metavar="JSON", help="more engine arguments of vLLM's")
    add(
        "--batch-size",
        type=positive,
        help="rows that a replica is handed at a time (default: a quarter of its share, to 32)",
    )
    add("--retries", type=natural, default=2, help="of rows that failed and of replicas that died (default: 2)")
    add("--ship", type=place, metavar="WHEEL", help="a wheel of this plugin for nodes that lack it")
    add("--runtime-env", type=runtime_env, default={}, metavar="JSON", help="more of Ray's runtime_env")


def runtime_env(text: str) -> dict[str, Any]:
    """For argparse: a JSON object of Ray's."""
    return json_object(text, '{"env_vars": {"NAME": "value"}}')


def main(args: argparse.Namespace) -> int:
    """Run every method over all prompts, print the table, write the lines."""
    check_folder(args.out)
    check_out(args.record, "--record")
    console = make_console()
    model = check_model(args.model)
    check_engine_args(args)
    methods = [with_options(method, args.engine_args) for method in with_dense(args.methods)]
    source = source_of(args, model)
    args.runner = runner_of(args)
    check_pool(args)
    found = prompts.survey(source())
    args.batch_size = args.batch_size or max(1, min(MAX_BATCH, found.n_rows // (4 * args.replicas)))
    asked = [Measurement.of(args, pool_of(args, method, model), found) for method in methods]
    make_folder(args.out)
    known = recorded(args.record, [one.key for one in asked], again=args.again)
    records = list(known.values())
    if known:
        console.print(f"{', '.join(r['method'] for r in records)}: {skipped_note(records)}", highlight=False)
    try:
        records += measure(args, [one for one in asked if one.key not in known], source, found, console)
    except (WrongAttentionError, Incomplete) as error:
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    console.print(table(records))
    console.print(f"answers: {args.out}", highlight=False, soft_wrap=True)
    return 0


def measure(
    args: argparse.Namespace, todo: list[Measurement], source: Source, found: Survey, console: Any
) -> list[dict[str, Any]]:
    """Answer what has no answer yet, and write a line per method to --record; the lines.

    Raises:
        UsageError: a folder holds rows of another measurement, or nothing is left to measure again.
        WrongAttentionError, Incomplete: as `run`.
    """
    records = []
    with contextlib.ExitStack() as stack:
        # Every folder is looked at before an engine starts for the first.
        code = code_of(args)
        folders = [stack.enter_context(Answers(args.out / one.name, one.case | code)) for one in todo]
        whole = [folder.n_rows() >= found.n_rows for folder in folders]
        if args.again and all(whole):
            raise UsageError(
                f"--again measures anew, and --out {args.out} holds all {found.n_rows:,} rows of "
                f"{', '.join(one.name for one in todo)} already: give a new folder as --out"
            )
        if not all(whole):
            stack.enter_context(stderr_to(args.out / "ray.log"))
            stack.enter_context(cluster(todo[0].pool, args.address))
        for one, folder in zip(todo, folders, strict=True):
            took = run(one.pool, args.runner, source, found, folder, console)
            line = one.about | one.case | {"key": one.key} | summary(one.pool, folder, took)
            if args.address is not None:
                line["driver"] = code  # what a wheel that it shipped was probably made from; the nodes know no commit
            records.append(line)
            if args.record and not is_recorded(args.record, line):
                append_records(args.record, [line])
    return records


def is_recorded(path: Path, line: dict[str, Any]) -> bool:
    """Whether a file has a line of these very rows, which a run that was killed after it left behind."""
    return any(all(old.get(name) == line[name] for name in ("key", "began")) for old in read_records(path))


def source_of(args: argparse.Namespace, model: Path) -> Source:
    """The prompts that were asked for."""
    if args.data is not None:
        return prompts.from_file(args.data, max_tokens=args.output_len, seed=args.seed)
    return prompts.generated(model, n=args.n, n_tokens=args.input_len, max_tokens=args.output_len, seed=args.seed)


def check_engine_args(args: argparse.Namespace) -> None:
    """Refuse engine arguments that would leave a record with less than it says."""
    if args.engine_args.get("disable_log_stats"):
        raise UsageError(
            "--engine-args disable_log_stats true: preemptions are counted by these stats, leave it out or give false"
        )


def check_pool(args: argparse.Namespace) -> None:
    """Refuse at once what the cluster would refuse later."""
    if args.address is not None:
        check_address(args.address)
    else:
        check_cores(args.replicas, args.cpus)


def pool_of(args: argparse.Namespace, method: Method, model: Path) -> Pool:
    """The replicas of one method."""
    runtime_env = dict(args.runtime_env)
    if args.ship is not None:
        if args.ship.suffix != ".whl" or not args.ship.is_file():
            raise UsageError(f"--ship {args.ship}: there is no such wheel; `pip wheel --no-deps .` makes one")
        runtime_env["py_modules"] = [*runtime_env.get("py_modules", []), *unpacked(args.ship)]
    arguments = engine_arguments(method, gpus=args.gpus, kv_cache_mib=args.kv_cache_mib, more=args.engine_args)
    return Pool(
        method=method,
        model=model,
        replicas=args.replicas,
        cpus=args.cpus,
        gpus=args.gpus,
        engine_arguments=arguments,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        batch_size=args.batch_size,
        retries=args.retries,
        runtime_env=runtime_env,
    )


def runner_of(args: argparse.Namespace) -> str:
    """Ray Data LLM where this Ray has it; it does not work through a Ray client.

    Raises:
        UsageError: it was asked for through a client.
    """
    client = str(args.address).startswith("ray://")
    if args.runner == "data" and client:
        raise UsageError(
            f"--runner data does not work with --address {args.address}: Ray Data needs a driver inside the cluster. "
            "Run this on one of its nodes with --address HOST:6379 or auto, or use --runner actors"
        )
    has_data = importlib.util.find_spec("ray.data") and importlib.util.find_spec("ray.data.llm")
    return args.runner or ("data" if has_data and not client else "actors")


def stream(pool: Pool, runner: str, todo: Iterator[Prompt]) -> Iterator[list[dict[str, Any]]]:
    """Batches of answers from the chosen runner."""
    if runner == "data":
        from vllm_sparq.benchmarks.cluster import data as ray_data

        return ray_data.answers(pool, todo)
    from vllm_sparq.benchmarks.cluster import actors as ray_actors

    return ray_actors.answers(pool, todo)


def run(pool: Pool, runner: str, source: Source, found: Survey, answers: Answers, console: Any) -> float | None:
    """Answer all rows that have no answer yet.

    Returns:
        Seconds that it took, with the start of the engines; None if an earlier run did a part.

    Raises:
        WrongAttentionError: a replica runs another attention than it should.
        Incomplete: rows have failed as often as they may.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    begin = time.monotonic()
    done = answers.ids()
    n_found = len(done)
    if done:
        console.print(f"{pool.method.name}: {n_found:,} of {found.n_rows:,} rows are done already", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(
            f"{pool.method.name}: {pool.replicas} replicas start", total=found.n_rows, completed=len(done)
        )

        def tell(n_done: int) -> None:
            bar.update(task, completed=n_done, description=f"{pool.method.name} on {pool.replicas} replicas")

        answer_all(pool, lambda todo: stream(pool, runner, todo), source, done, answers, tell)
    answers.flush()
    return None if n_found else time.monotonic() - begin


def answer_all(
    pool: Pool,
    ask: Callable[[Iterator[Prompt]], Iterator[list[dict[str, Any]]]],
    source: Source,
    done: set[str],
    answers: Answers,
    tell: Callable[[int], None],
) -> None:
    """Ask for rows until all are done, those that failed again and again up to the pool's retries.

    Args:
        ask: makes batches of answers of prompts.
        done: ids of rows on disk; grows.

    Raises:
        WrongAttentionError, Incomplete: as `run`.
    """
    failures: list[Failure] = []
    for _ in range(1 + pool.retries):
        todo = (prompt for prompt in source() if prompt.id not in done)
        first = next(todo, None)
        if first is None:
            return
        failures = []
        try:
            for batch in ask(_chain(first, todo)):
                answered = {row["id"]: row for row in batch if not row.get("error") and row["id"] not in done}
                failures += [Failure(id=row["id"], error=row["error"]) for row in batch if row.get("error")]
                answers.add(list(answered.values()))
                done.update(answered)
                tell(len(done))
        except UsageError:
            raise
        except Exception as error:
            raise plain(error, pool) from error
        finally:
            answers.flush()
    n_left = sum(prompt.id not in done for prompt in source())
    if n_left and not failures:
        raise Incomplete(
            f"{n_left} rows of {pool.method.name} got neither an answer nor an error, {1 + pool.retries} times: run "
            "the command again. The other answers are kept"
        )
    if n_left:
        raise Incomplete(
            f"{n_left} rows of {pool.method.name} failed {1 + pool.retries} times; the first is row "
            f"{failures[0].id!r}: {failures[0].error.splitlines()[0][:300]}. The other answers are kept"
        )


def plain(error: BaseException, pool: Pool) -> RuntimeError:
    """The reason below what Ray wraps around it."""
    chain: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        one = todo.pop(0)
        if isinstance(one, BaseException) and one not in chain:
            chain.append(one)
            todo += [getattr(one, "cause", None), one.__cause__, one.__context__]
    for one in chain:
        if isinstance(one, WrongAttentionError):
            return WrongAttentionError(str(getattr(one, "cause", one)))
    deepest = chain[-1]
    lines = [line for line in str(deepest).splitlines() if line.strip()]
    telling = [line.strip() for line in lines if "Error" in line.partition(":")[0]]
    reason = (telling or lines or [type(deepest).__name__])[-1]
    return Incomplete(f"the replicas of {pool.method.name} failed: {reason[:400]}. Answers so far are kept")


def _chain(first: Prompt, rest: Iterator[Prompt]) -> Iterator[Prompt]:
    yield first
    yield from rest
