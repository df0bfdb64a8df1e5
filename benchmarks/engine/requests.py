"""Whole requests through `vllm bench latency` and `vllm bench throughput`: `bench engine` with ``--input-len``.

vLLM's own two commands run as they are, an engine of each method after the other, and their keys go into the records.
Beside them stands what vLLM does not say: which attention classes ran (or nothing is recorded), how many tokens the
cache holds, how many of the longest requests fit in at a time, and how many were preempted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import CacheLayout, layout_in_use
from vllm_sparq.benchmarks.common.engine_process import EngineProcess
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention, engine_report, speed_note
from vllm_sparq.benchmarks.common.records import (
    append_records,
    case_key,
    dense_beside,
    provenance,
    recorded,
    skipped_note,
)
from vllm_sparq.benchmarks.common.threads import engine_threads
from vllm_sparq.benchmarks.engine.cases import Model
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import make_console

DRAWN_IDS = 10_000
"""`vllm bench latency` draws its prompts from so many token ids, whatever the model's vocabulary is."""

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "INFO", "TQDM_DISABLE": ""}
"""Of vLLM's commands, which divide by what their progress bars have counted."""

SPEED = {"latency": "avg_latency", "throughput": "tokens_per_second"}
"""vLLM's command -> the key that says how fast; a latency is better the smaller it is."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What is asked: tokens of each prompt and answer, requests, bytes of KV cache and tokens of a block (None: the
    engine's choice; a block size is that of our backends)."""

    input_len: int
    output_len: int
    batch: int | None = None
    num_prompts: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int | None = None

    @property
    def command(self) -> str:
        """Of vLLM's: all requests of a batch at once, or as many as fit in at a time until all are answered."""
        return "throughput" if self.batch is None else "latency"


def plan(whole: Requests, batches: list[int]) -> list[Requests]:
    """A latency for each batch, and the throughput of as many ``whole`` requests."""
    return [*(replace(whole, num_prompts=None, batch=batch) for batch in batches), whole]


def why_not(requests: Requests, model: Model) -> str | None:
    """Why vLLM's command cannot run on a model, if so."""
    vocabulary = model.shape.vocab_size
    if requests.command == "latency" and vocabulary < DRAWN_IDS:
        return (
            f"no latency of {model.name}: `vllm bench latency` draws token ids below {DRAWN_IDS:,}, and its vocabulary "
            f"has {vocabulary:,}"
        )
    return None


def key_of(requests: Requests, method: Method, model: Model) -> str:
    """Of the record of one method."""
    layout = layout_of(requests, method, model)
    fields = asdict(requests) | asdict(method) | model.fields | layout.fields
    return case_key("requests", fields | engine_threads())


def layout_of(requests: Requests, method: Method, model: Model) -> CacheLayout:
    """How the engine of a method will cut its cache."""
    block_size = None if method.backend is None else requests.block_size
    return CacheLayout.of(method, model.shape, max_model_len=longest(requests, model), block_size=block_size)


@contextlib.contextmanager
def model_folder(model: Model) -> Iterator[Path]:
    """The model's folder. The dummy one gets a tokenizer, which vLLM draws the words of prompts from."""
    if model.folder is not None:
        yield model.folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(model.config))
        for file in WEIGHTS.glob("*token*"):
            shutil.copy(file, folder)
        yield folder


def longest(requests: Requests, model: Model) -> int:
    """Tokens that a request may have. vLLM draws words for a throughput, which may be a few more tokens than asked."""
    wanted = requests.input_len + requests.output_len + max(16, requests.input_len // 50)
    return min(wanted, model.shape.max_model_len)


def words_for_vllm(requests: Requests, method: Method, folder: Path, model: Model, result: Path) -> list[str]:
    """The arguments of vLLM's command."""
    words = ["--model", str(folder), "--enforce-eager", "--output-json", str(result), "--disable-detokenize"]
    words += ["--max-model-len", str(longest(requests, model))]
    lengths = {"input-len": requests.input_len, "output-len": requests.output_len}
    for name, length in lengths.items():
        words += [f"--{name}" if requests.batch else f"--random-{name}", str(length)]
    if requests.batch is None:
        words += ["--dataset-name", "random", "--num-prompts", str(requests.num_prompts), "--num-warmups", "1"]
    else:
        words += ["--batch-size", str(requests.batch), "--num-iters-warmup", "1", "--num-iters", "3"]
    if model.folder is None:
        words += ["--load-format", "dummy"]
    if requests.kv_cache_bytes is not None:
        words += ["--kv-cache-memory-bytes", str(requests.kv_cache_bytes)]
    if method.backend is not None:
        words += ["--attention-backend", method.backend, "--additional-config", json.dumps(method.additional_config)]
        words += [] if requests.block_size is None else ["--block-size", str(requests.block_size)]
    return words


class VllmCommand:
    """vLLM's own command, in the process of its engine."""

    def run(self, command: str, words: list[str]) -> dict[str, Any]:
        """Run it, and say what its engine was."""
        import importlib

        import torch
        import vllm
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        engines: list[Any] = []
        make = vllm.LLM.from_engine_args

        def remember(arguments: Any) -> Any:
            arguments.disable_log_stats = False  # preemptions are counted there
            engines.append(make(arguments))
            return engines[-1]

        vllm.LLM.from_engine_args = remember  # type: ignore[method-assign, assignment]
        module = importlib.import_module(f"vllm.benchmarks.{command}")
        parser_class: Any = FlexibleArgumentParser
        parser = parser_class()
        module.add_cli_args(parser)
        module.main(parser.parse_args(words))
        config = engines[0].llm_engine.vllm_config
        metrics = {m.name: m.value for m in engines[0].get_metrics() if hasattr(m, "value")}
        return {
            "report": engine_report(config),
            "kv_capacity_tokens": int(config.cache_config.kv_cache_size_tokens),
            "max_concurrency": round(float(config.cache_config.kv_cache_max_concurrency), 2),
            "preemptions": int(metrics["vllm:num_preemptions"]),
            "layout": layout_in_use(engines[0].llm_engine),
            "threads": torch.get_num_threads(),
        }


def measure(requests: Requests, method: Method, model: Model) -> dict[str, Any]:
    """One engine, in a process of its own.

    Raises:
        UsageError: it ended before it was through.
        WrongAttentionError: it ran another attention than the method's.
    """
    name = f"`vllm bench {requests.command}` with {method.name}"
    with (
        model_folder(model) as folder,
        tempfile.TemporaryDirectory() as temporary,
        EngineProcess(name, VllmCommand, environment=ENVIRONMENT) as process,
    ):
        result = Path(temporary) / "result.json"
        words = words_for_vllm(requests, method, folder, model, result)
        engine = process.ask("run", requests.command, words)
        found = json.loads(result.read_text())
    found.pop("model_id")  # a path of this machine
    return {
        "bench": "requests",
        "key": key_of(requests, method, model),
        "command": requests.command,
        "model": model.name,
        "method": method.name,
        **{name: value for name, value in asdict(requests).items() if value is not None},
        **engine.pop("layout").fields,
        **found,
        "threads": engine.pop("threads"),
        "sparq": {
            "method": method.name,
            "options": method.options,
            "attention": check_attention(method, engine.pop("report")),
            **engine,
        },
    }


def speed(record: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """How many times as fast as dense, of two records of the same requests."""
    name = SPEED[str(record["command"])]
    ratio = float(record[name]) / float(dense[name])
    return 1 / ratio if record["command"] == "latency" else ratio


def columns(record: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, str]:
    """What a table says of a record beside that of dense."""
    about = record["sparq"]
    return {
        "prompt + answer": f"{record['input_len']:,} + {record['output_len']:,}",
        "requests": f"{record.get('num_prompts') or record['batch']}"
        + (" at once" if record["command"] == "latency" else ""),
        "method": str(record["method"]),
        "seconds": f"{record.get('elapsed_time') or record['avg_latency']:,.2f}",
        "beside dense": "" if dense is None else speed_note(speed(record, dense)),
        "KV cache, tokens": f"{about['kv_capacity_tokens']:,}",
        "longest requests at a time": f"{about['max_concurrency']:.1f}",
        "preemptions": str(about["preemptions"]),
        "attention that ran": str(about["attention"]),
    }


def dense_of(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of dense for the same requests, of the same code and machine, among others."""
    case = ("model", "command", "input_len", "output_len", "batch", "num_prompts", "kv_cache_bytes", "commit")
    return dense_beside(record, records, case)


def main(args: argparse.Namespace, methods: list[Method], model: Model) -> int:
    """Measure what is not on record, print the table, write the lines."""
    console = make_console()
    model.check_length("--input-len", args.input_len, args.output_len)
    kv_cache_bytes = None if args.kv_cache_mib is None else args.kv_cache_mib << 20
    whole = Requests(
        input_len=args.input_len,
        output_len=args.output_len,
        num_prompts=args.num_prompts,
        kv_cache_bytes=kv_cache_bytes,
        block_size=args.block_size,
    )
    cases = plan(whole, args.batch)
    notes = [note for case in cases if (note := why_not(case, model))]
    cases = [case for case in cases if not why_not(case, model)]
    keys = [key_of(case, method, model) for case in cases for method in methods]
    records = recorded(args.out, keys, again=args.again)
    old = list(records.values())
    try:
        for case, method in ((case, method) for case in cases for method in methods):
            if (key := key_of(case, method, model)) in records:
                continue
            with console.status(f"vllm bench {case.command}, {method.name} ..."):
                records[key] = measure(case, method, model) | provenance()
            if args.out:
                append_records(args.out, [records[key]])
    except WrongAttentionError as error:
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    console.print(table([records[key] for key in keys]))
    for note in [*notes, *([skipped_note(old)] if old else [])]:
        console.print(note, highlight=False, soft_wrap=True)
    return 0


def table(records: list[dict[str, Any]]) -> Any:
    """A line per case and method."""
    from rich.table import Table

    view = Table(title=f"Whole requests, one engine after the other, {records[0]['model']}")
    for i, record in enumerate(records):
        cells = columns(record, dense_of(record, records))
        if i == 0:
            for name in cells:
                view.add_column(name, justify="left" if name in ("method", "attention that ran") else "right")
        elif record["method"] == DENSE:
            view.add_section()
        view.add_row(*cells.values())
    return view
