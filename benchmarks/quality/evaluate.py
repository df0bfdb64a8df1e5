"""What compression costs in answers: tasks through the engine, dense and compressed, on the same prompts.

    vllm-sparq eval --tasks needle,repetition --lengths 512,2048 --n 50
    vllm-sparq eval --methods int4,kivi2,sparq+int4 --out results/quality

Every method runs in an engine of its own, with vLLM's batching; dense is vLLM's own backend. Prompts are drawn from a
seed and are the same for all methods, so the difference between two methods is measured prompt by prompt. Examples are
answered in fixed groups, and a group's lines are written together, so that a killed run goes on with the batches that
an undisturbed one would have had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.engine_arguments import refuse
from vllm_sparq.benchmarks.common.lines import check_folder
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.quality.divergence import distribution_file
from vllm_sparq.benchmarks.quality.engine import Engine, Output, Run, same_cache
from vllm_sparq.benchmarks.quality.forms import CHAT
from vllm_sparq.benchmarks.quality.shortening import FREQUENCY, shortened_by
from vllm_sparq.benchmarks.tasks.generated import TASKS, Example
from vllm_sparq.benchmarks.tasks.metrics import LIKELIHOOD, MEASURED
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.config import Options
from vllm_sparq.console import (
    DTYPES,
    UsageError,
    check_model,
    comma_names,
    comma_numbers,
    json_object,
    llm_arguments,
    make_console,
    natural,
    place,
    positive,
)

GIVEN = {
    "model": "--model",
    "dtype": "--dtype",
    "attention_backend": "--methods",
    "additional_config": "--methods and --options",
    "kv_cache_dtype": "block formats as in --methods int8",
    "logits_processors": "",
}
"""Arguments of vLLM's that the command sets itself or that its bytes of cache are counted by: what to use instead."""

GROUP = 32
"""Examples of a task and length that are answered in one batch."""


def methods_at(names: Sequence[str], compressions: Sequence[str], options: dict[str, Any]) -> list[Method]:
    """Dense, and each method; those that take a compression once for each. Options of the user's are part of a name.

    Raises:
        UsageError: a name, a compression or options that mean nothing.
    """
    found = [Method.named(DENSE)]
    more = f" {json.dumps(options)}" if options else ""
    for name in names:
        if name == DENSE:
            continue
        if name == FREQUENCY:
            found += [replace(shortened_by(_number(text)), name=f"{name} 1/{text}") for text in compressions]
            continue
        plain = Method.named(name, options)
        knob = compression_options(plain)
        if knob is None:
            found.append(replace(plain, name=f"{name}{more}"))
            continue
        for text in compressions:
            chosen = Method.named(name, {**knob(_number(text)), **options})
            found.append(replace(chosen, name=f"{name} 1/{text}{more}"))
    names_found = [method.name for method in found]
    if len(set(names_found)) < len(names_found):
        raise UsageError(f"a method or a compression is named twice: {', '.join(names_found)}")
    return found


def compression_options(method: Method) -> Any:
    """What a compression means to a method, as a function from the number to options; None if nothing.

    Sparse reads are sparse from the first token on, so that short prompts measure the method too.
    """
    options: Options = method.parsed
    if "compression" in method.read.dials:
        return lambda number: {"compression": number, "dense_below": 0}
    if options.retention != "all":
        return lambda number: {"budget": 1 / number}
    return None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise UsageError(f"--compression {text!r} is not usable: give numbers of at least 1, as in 2,4,8")
    return number


def groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Pieces of at most `GROUP` examples, each of one task and length."""
    for _, cell in itertools.groupby(examples, key=lambda example: (example.task, example.length)):
        rest = list(cell)
        yield from (rest[start : start + GROUP] for start in range(0, len(rest), GROUP))


def evaluate(
    methods: Sequence[Method], run: Run, examples: Sequence[Example], store: Any, console: Any
) -> list[dict[str, Any]]:
    """A line for every method and example: those in the store, and the others answered now.

    Methods that differ only in how they read the same cache share an engine.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    pieces = list(groups(examples))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    engine: Engine | None = None
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(methods) * len(examples))
        try:
            for method in methods:
                progress.update(bar, description=method.name)
                for piece in pieces:
                    missing = [one for one in piece if _is_missing(method, one, methods, store)]
                    if missing:
                        engine = _engine_for(method, run, engine, console)
                        store.add(_answered(engine, method, missing, store))
                    progress.advance(bar, len(piece))
        except BaseException:
            if engine is not None:
                engine.kill()
            raise
    if engine is not None:
        engine.close()
    return [store.lines[store.key(method, one)] for method in methods for one in examples]


def _is_missing(method: Method, example: Example, methods: Sequence[Method], store: Any) -> bool:
    """Whether an example is to be answered: it is not in the store, or dense's distributions are wanted and are not."""
    if store.key(method, example) not in store.lines:
        return True
    if method.name != DENSE or not example.answer_ids or (store.distributions / distribution_file(example)).exists():
        return False
    return any(store.key(other, example) not in store.lines for other in methods)


def _engine_for(method: Method, run: Run, engine: Engine | None, console: Any) -> Engine:
    if engine is not None and same_cache(engine.method, method):
        engine.use(method)
        return engine
    if engine is not None:
        engine.close()
    engine = Engine(method, run)
    engine.start()
    console.print(f"{method.name}: attention runs in {', '.join(engine.classes)}")
    return engine


def _answered(engine: Engine, method: Method, examples: Sequence[Example], store: Any) -> list[dict[str, Any]]:
    """Lines of examples; those that do not fit into the model's context are skipped, and say so."""
    limit = engine.max_model_len
    fitting = [one for one in examples if one.n_prompt_tokens + one.max_tokens <= limit]
    forced = any(one.answer_ids for one in fitting)
    answers = engine.answer(fitting, store.distributions if forced else None) if fitting else []
    outputs = dict(zip(map(id, fitting), answers, strict=True))
    lines = []
    for one in examples:
        if id(one) in outputs:
            found = scored(one, outputs[id(one)])
        else:
            found = {"skipped": f"{one.n_prompt_tokens} + {one.max_tokens} tokens do not fit into {limit}"}
        lines.append(store.line(method, one, {**found, "classes": engine.classes}))
    return lines


def scored(example: Example, output: Output) -> dict[str, Any]:
    """Output, score and output length of a line."""
    from vllm_sparq.benchmarks.tasks.papers.metrics import ALL_METRICS

    if example.metric in MEASURED:
        assert output.nats is not None
        score = _bits(example, output.nats)
    else:
        score = ALL_METRICS[example.metric](output.text, example.accepted, example.choices)
    found = {"output": output.text, "score": score, "output_tokens": output.n_tokens}
    if output.divergence is not None:
        found |= {"divergence": [round(kl, 7) for kl in output.divergence], "n_changed": output.n_changed}
    return found


def _bits(example: Example, nats: float) -> float:
    """Per byte or character of the answer, or of all of it."""
    if example.metric == LIKELIHOOD:
        return nats / 0.6931471805599453
    size = len(example.answer.encode()) if example.metric == "bits_per_byte" else len(example.answer)
    return nats / 0.6931471805599453 / size


def summary(
    lines: Sequence[dict[str, Any]], methods: Sequence[Method], run: Run, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A cell's record for the report: scores, intervals, bytes, and what was run."""
    from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape
    from vllm_sparq.benchmarks.quality.cells import cells

    shape = CacheShape.of(run.model, run.dtype)
    by_name = {method.name: method for method in methods}
    records = cells(lines)
    for record in records:
        method = by_name[record["method"]]
        record |= dict(backend=method.backend or "vllm", options=method.options, model=run.model.name, dtype=run.dtype)
        record |= {**about, "engine_args": run.engine_args}
        if "score" in record:
            context = max(1, round(record["prompt_tokens"] + record["output_tokens"] / 2))
            record["kv_bytes_moved"] = shape.moved(method, context)
            record["kv_bytes_held"] = round(shape.held(method, context), 1)
    return records


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command shares which answers prompts."""
    parser.add_argument("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="element type of the model (default: bfloat16)"
    )
    parser.add_argument(
        "--engine-args", type=llm_arguments, default={}, metavar="JSON", help="more arguments of vLLM's LLM"
    )
    parser.add_argument("--seed", type=natural, default=0)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of what is read and written, for every command that answers prompts."""
    parser.add_argument("--haystack", type=place, help="text to hide facts in (default: written by a small grammar)")
    parser.add_argument("--text", type=place, help="file or folder for task text (default: the bundled model's corpus)")
    parser.add_argument(
        "--chat-template",
        choices=CHAT,
        default="auto",
        help="ask questions in the model's: where it has one, always, or never (default: auto)",
    )
    parser.add_argument("--data", type=place, help="folder with the papers' sets; what is missing is named")
    parser.add_argument(
        "--out", type=place, metavar="FOLDER", help="keep every line there; a killed run goes on from it"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq eval`."""
    from vllm_sparq.benchmarks.quality.prompts import short_names

    add_model_arguments(parser)
    parser.add_argument(
        "--tasks",
        type=comma_names,
        default=list(TASKS),
        help=f"of {', '.join(short_names())}, or a set as in longbench_qasper (default: {','.join(TASKS)}); "
        "needle:likelihood forces the right answer",
    )
    parser.add_argument(
        "--lengths", type=comma_numbers, default=[512, 1024, 2048], help="prompt tokens (default: 512,1024,2048)"
    )
    parser.add_argument("--n", type=positive, default=50, help="prompts per task and length (default: 50)")
    parser.add_argument(
        "--methods",
        type=comma_names,
        default=["sparq"],
        help="beside dense: a backend, a block format, or both as in sparq+int4; or frequency, a baseline that leaves "
        "a prompt's most frequent tokens out before dense attention reads it (default: sparq)",
    )
    parser.add_argument("--compression", type=comma_names, default=["8"], help="of methods that take one (default: 8)")
    parser.add_argument("--options", type=json_object, default={}, help="more sparq options, as JSON")
    add_text_arguments(parser)
    parser.epilog = """\
Contexts are read sparsely from the first token on (dense_below: 0), unless --options say otherwise. A prompt beyond the
model's context is skipped and counted. Bits per byte of task text are forced step by step where a prompt does not show
what a method does.

examples:
  vllm-sparq eval                                              four tasks on the bundled model at compression 8
  vllm-sparq eval --tasks needle --compression 4,8,16 --n 20   how much is too much?
  vllm-sparq eval --methods int8,int4,kivi4,kivi2,sparq+int4   what do quantized blocks cost?
  vllm-sparq eval --tasks squad,longbench --data DIR --model M --out results/quality
"""


def main(args: argparse.Namespace) -> int:
    """Answer, score, write, print."""
    from vllm_sparq.benchmarks.quality.cells import table
    from vllm_sparq.benchmarks.quality.store import FILES, Store

    check_folder(args.out, files=FILES)
    console = make_console()
    methods = methods_at(args.methods, args.compression, args.options)
    run, examples = prepare(args, console)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(args.out or Path(scratch), run)
        lines = evaluate(methods, run, examples, store, console)
        about = {"seed": args.seed, "n_wanted": args.n}
        records = store.write_cells(summary(lines, methods, run, about), about)
    console.print(table(records))
    return 0


def prepare(args: argparse.Namespace, console: Any) -> tuple[Run, list[Example]]:
    """What the arguments mean: the run, and its examples.

    Raises:
        UsageError: arguments that mean nothing.
    """
    from vllm_sparq.benchmarks.quality.prompts import Wanted, check_tasks, read_haystack, read_text
    from vllm_sparq.benchmarks.tasks.papers import expand

    refuse(args.engine_args, GIVEN)
    tasks = expand(args.tasks)
    check_tasks(tasks)
    args.model = check_model(args.model)
    from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape

    run = Run(model=args.model, dtype=args.dtype, engine_args=args.engine_args)
    wanted = Wanted(
        model=args.model,
        tasks=tasks,
        lengths=args.lengths,
        n=args.n,
        seed=args.seed,
        haystack=read_haystack(args.haystack) if args.haystack else None,
        text=read_text(args.text) if args.text else None,
        data=args.data,
        chat=args.chat_template,
    )
    with console.status(f"writing {args.n} prompts per task and length ..."):
        limit = args.engine_args.get("max_model_len") or CacheShape.of(run.model, run.dtype).max_model_len
        return run, wanted.examples(limit)
