"""What compression costs in answers: generated tasks through the engine, dense and compressed, on the same prompts.

    vllm-sparq eval --tasks needle,repetition --lengths 512,2048 --n 50
    vllm-sparq eval --methods int4,kivi2,sparq+int4

Every method is an engine of its own, with vLLM's batching; dense is vLLM's own backend. Prompts are drawn from a seed
and are the same for all methods, so the difference between two methods is measured prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vllm_sparq.benchmarks.records import append_records, provenance
from vllm_sparq.benchmarks.tasks import TASKS, Example, make_example, score
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import UsageError, comma_names, comma_numbers
from vllm_sparq.layout import FORMATS


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an engine reads: a backend of vLLM's or ours, and our options."""

    name: str
    backend: str
    options: dict[str, Any]

    @classmethod
    def of(cls, method: str, compression: str, options: dict[str, Any]) -> Setting:
        """Ours, by name: a block format, ``sparq``, or both with a plus between them. ``options`` go on top.

        Raises:
            UsageError: a name that is none of these.
        """
        read, _, block_format = method.rpartition("+")
        if method == "sparq":
            read, block_format = method, "model"
        if read not in ("", "sparq") or block_format not in FORMATS:
            raise UsageError(
                f"unknown method {method!r}: name a format ({', '.join(FORMATS)}), sparq, or both as in sparq+int4"
            )
        if not read:
            return cls(name=method, backend="SPARQ", options={**options, "format": block_format, "read": "dense"})
        chosen = {"dense_below": 0, **options, "format": block_format, "compression": float(compression)}
        return cls(name=f"{method} 1/{compression}", backend="SPARQ", options=chosen)


def settings(methods: Sequence[str], compressions: Sequence[str], options: dict[str, Any]) -> list[Setting]:
    """vLLM's dense attention, and each method, those that read sparsely once for each compression."""
    found = [Setting(name="dense", backend="CPU_ATTN", options={})]
    for method in methods:
        for compression in compressions if "sparq" in method else compressions[:1]:
            found.append(Setting.of(method, compression, options))
    return found


def make_prompts(model: Path, tasks: Sequence[str], lengths: Sequence[int], n: int, seed: int) -> list[Example]:
    """``n`` examples of every task and length, depths spread evenly."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    make = partial(make_example, count_tokens=lambda text: len(tokenizer(text).input_ids))
    return [
        make(task, n_tokens=length, seed=seed + i, depth=(i + 0.5) / n)
        for task in tasks
        for length in lengths
        for i in range(n)
    ]


def answer(setting: Setting, model: Path, dtype: Any, examples: list[Example], pipe: Connection) -> None:
    """The process of one engine: all examples in one batch; sends the outputs and the attention classes that ran."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        attention_backend=setting.backend,
        additional_config={"sparq": setting.options},
        kv_cache_memory_bytes=1 << 30,
        disable_log_stats=True,
    )
    params = [
        SamplingParams(temperature=0, max_tokens=example.max_tokens, stop=list(example.stop)) for example in examples
    ]
    outputs = llm.generate([example.prompt for example in examples], params, use_tqdm=True)
    layers: Any = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    classes = sorted({type(layer.impl).__name__ for layer in layers})
    pipe.send(([output.outputs[0].text for output in outputs], classes))


def run_engine(setting: Setting, model: Path, dtype: str, examples: list[Example]) -> tuple[list[str], list[str]]:
    """Outputs and attention classes of an engine in a fresh process.

    Raises:
        UsageError: the engine did not start; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(setting, model, dtype, examples, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result: tuple[list[str], list[str]] = ours.recv()
    except EOFError:
        raise UsageError(f"the {setting.name} engine ended before it answered; its reason stands above") from None
    process.join()
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq eval`."""
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="a model folder (default: the bundled model)")
    parser.add_argument("--tasks", type=comma_names, default=list(TASKS), help=f"of {','.join(TASKS)} (default: all)")
    parser.add_argument("--lengths", type=comma_numbers, default=[512, 1024, 2048, 3900], help="prompt tokens")
    parser.add_argument("--n", type=int, default=50, help="prompts per task and length (default: 50)")
    parser.add_argument(
        "--methods",
        type=comma_names,
        default=["sparq"],
        help="beside dense: sparq, a format (int8, int4, kivi4, kivi2), or both as in sparq+int4 (default: sparq)",
    )
    parser.add_argument("--compression", type=comma_names, default=["8"], help="of sparq, comma-separated (default: 8)")
    parser.add_argument("--options", type=json.loads, default={}, help="more sparq options, as JSON")
    parser.add_argument("--dtype", default="bfloat16", help="element type of the model (default: bfloat16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append one JSON line per task, length and method")
    parser.epilog = """\
Contexts are read sparsely from the first token on (dense_below: 0), unless --options say otherwise.

examples:
  vllm-sparq eval                                              all tasks on the bundled model at compression 8
  vllm-sparq eval --tasks needle --compression 4,8,16 --n 20   how much is too much?
  vllm-sparq eval --methods int8,int4,kivi4,kivi2,sparq+int4   what do quantized blocks cost?
  vllm-sparq eval --options '{"mean_value": "off"}' --out eval.jsonl
"""


def main(args: argparse.Namespace) -> int:
    """Answer, score, print, write."""
    from rich.console import Console

    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"unknown task {unknown[0]!r}: choose from {', '.join(TASKS)}")
    if not (args.model / "config.json").is_file():
        raise UsageError(f"no model in {args.model}: give a folder with config.json, weights and tokenizer")
    console = Console()
    engines = settings(args.methods, args.compression, args.options)
    with console.status(f"writing {args.n} prompts per task and length ..."):
        examples = make_prompts(args.model, args.tasks, args.lengths, args.n, args.seed)
    scores = {}
    for setting in engines:
        console.print(f"{setting.name}: {len(examples)} prompts")
        outputs, classes = run_engine(setting, args.model, args.dtype, examples)
        console.print(f"  attention ran in {', '.join(classes)}")
        scores[setting.name] = [score(example, output) for example, output in zip(examples, outputs, strict=True)]
    rows = summarise(scores, args.tasks, args.lengths, args.n)
    if args.out:
        about = {"bench": "quality", "model": args.model.name, "seed": args.seed, **provenance()}
        append_records(args.out, [{**row, **about} for row in rows])
    console.print(table(rows))
    return 0


def summarise(
    scores: dict[str, list[float]], tasks: Sequence[str], lengths: Sequence[int], n: int
) -> list[dict[str, Any]]:
    """One row per task, length and method: mean score and its difference from dense, with standard errors."""
    rows = []
    cells = [(task, length) for task in tasks for length in lengths]
    for i, (task, length) in enumerate(cells):
        dense = scores["dense"][i * n : (i + 1) * n]
        for method, values in scores.items():
            mine = values[i * n : (i + 1) * n]
            difference = [a - b for a, b in zip(mine, dense, strict=True)]
            rows.append(
                dict(
                    task=task,
                    context=length,
                    method=method,
                    n=n,
                    score=fmean(mine),
                    score_error=_standard_error(mine),
                    difference=fmean(difference),
                    difference_error=_standard_error(difference),
                )
            )
    return rows


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def table(rows: list[dict[str, Any]]) -> Any:
    """A row per task, context and method; in points of 100."""
    from rich.table import Table

    view = Table(title=f"Score of 100 ± standard error, {rows[0]['n']} prompts per cell")
    for column in ("task", "context", "method", "score", "beside dense"):
        view.add_column(column, justify="left" if column in ("task", "method") else "right")
    n_methods = len({row["method"] for row in rows})
    for i, row in enumerate(rows):
        first, last = i % n_methods == 0, i % n_methods == n_methods - 1
        view.add_row(
            row["task"] if first else "",
            f"{row['context']:,}" if first else "",
            row["method"],
            f"{100 * row['score']:.1f} ± {100 * row['score_error']:.1f}",
            "" if row["method"] == "dense" else f"{100 * row['difference']:+.1f} ± {100 * row['difference_error']:.1f}",
            end_section=last,
        )
    return view
