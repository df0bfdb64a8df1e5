"""Time per output token through the engine: each method against vLLM's own attention and against none at all.

    vllm-sparq bench engine --methods sparq,kivi,sparq+int4 --context 32768 --batch 1,4,8

The engines, on one dummy-weight model of a real model's shape or on a model of yours, each in a process of its own,
decode in turns: one decodes while the others wait, round after round, so that all see the same machine. One engine
skips the attention op of its decode steps; its time is what no attention kernel can beat, and dense time over its time
is the Amdahl bound of any speed-up. Every engine says which attention classes it runs, or nothing is measured.

All requests of a batch share one prompt through prefix caching, so the context is prefilled once. The attention of that
prefill is skipped too, everywhere alike: K and V are written, and what they hold does not change how long a read takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import layout_in_use
from vllm_sparq.benchmarks.common.engine_process import IN_TURNS, EngineProcess
from vllm_sparq.benchmarks.common.lines import check_out
from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention, engine_report, speed_note
from vllm_sparq.benchmarks.common.records import append_records, provenance, recorded, skipped_note
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import (
    DEFAULT_OPTIONS,
    N_TAIL,
    SKIPPED,
    Case,
    Engine,
    Model,
    engines,
    key_of,
)
from vllm_sparq.console import comma_names, comma_numbers, json_object, make_console, place, positive

EPILOG = """\
With --context, decode steps of all engines in turns, dense and "no attention" always among them. With --input-len,
whole requests, one engine after the other: a latency for each --batch, and the throughput of --num-prompts.

examples:
  vllm-sparq bench engine --methods sparq,kivi,sparq+int4 --context 8192,32768 --batch 1,4,8 --out engine.jsonl
  vllm-sparq bench engine --model M --methods sparq,kivi,h2o --input-len 8192 --output-len 128
  vllm-sparq bench engine --methods h2o --input-len 1000 --output-len 1500 --num-prompts 16 --kv-cache-mib 48
"""


class SkippedAttention:
    """Replaces `forward` of an attention implementation: writes K and V, and attends only where asked to."""

    def __init__(self, impl: Any, *, decode: bool) -> None:
        self.attend, self.decode = impl.forward, decode
        self.write_step = getattr(impl, "write_step", None)  # vLLM's write before `forward`

    def __call__(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, meta: Any, output: Any, **kw: Any
    ) -> Any:
        turns = getattr(meta, "turns", None)  # of a step that may evict
        step = turns[0].step if turns else meta
        if meta is None or (self.decode and int(step.query_start_loc.diff().max()) == 1):
            return self.attend(layer, query, key, value, kv_cache, meta, output=output, **kw)
        if self.write_step is not None:
            self.write_step(layer, key, value, kv_cache, meta)
        return output.fill_(0)


class TurnsWorker:
    """One engine, in the process that it is made in: prepares a batch when told to, and decodes when it is its turn."""

    def __init__(self, chosen: Engine, model: Path, *, dummy: bool, max_context: int, max_batch: int) -> None:
        import torch
        from vllm import LLM, SamplingParams

        # The shared prompt, a tail of its own for each request, and room for our larger pages. Where tokens are evicted
        # nothing is shared, but a prompt is cut to its budget before the next one is read.
        self.kv_bytes = ModelShape.of(model).dense_bytes * (max_context + N_TAIL * (max_batch + 2)) * 5 // 4
        llm = LLM(
            str(model),
            load_format="dummy" if dummy else "auto",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_context + N_TAIL,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=self.kv_bytes,
            disable_log_stats=True,
            **chosen.arguments,
        )
        self.engine: Any = llm.llm_engine
        self.report = engine_report(self.engine.vllm_config)
        for layer in self.engine.vllm_config.compilation_config.static_forward_context.values():
            layer.impl.forward = SkippedAttention(layer.impl, decode=not chosen.skip_attention)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(10, 1000, (max_context,), generator=generator).tolist()
        self.params = SamplingParams(temperature=0, max_tokens=N_TAIL - 64, ignore_eos=True, detokenize=False)

    def describe(self) -> dict[str, Any]:
        """The classes that run, and how the cache is cut."""
        return {
            "report": self.report,
            "kv_capacity_tokens": self.engine.vllm_config.cache_config.kv_cache_size_tokens,
            "kv_bytes": self.kv_bytes,
            **layout_in_use(self.engine).fields,
        }

    def prepare(self, case: Case) -> None:
        """Fill the cache, and let every request decode its first token."""
        running = [request.request_id for request in self.engine.output_processor.request_states.values()]
        self.engine.abort_request(running, internal=True)
        for i in range(case.batch):
            name = f"{case.context}-{case.batch}-{i}"
            self.engine.add_request(name, {"prompt_token_ids": self.prompt[: case.context]}, self.params)
        started = 0
        while started < case.batch:
            started += sum(len(out.outputs[0].token_ids) == 1 for out in self.engine.step())

    def decode(self, n_steps: int) -> list[float]:
        """Seconds of each of the next steps."""
        times = []
        for _ in range(n_steps):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return times


def start(
    stack: contextlib.ExitStack,
    chosen: list[Engine],
    model: Model,
    folder: Path,
    max_context: int,
    max_batch: int,
    report: Callable[[str], None],
) -> tuple[dict[str, EngineProcess], dict[str, dict[str, Any]]]:
    """Name -> running engine, which ends with ``stack``, and name -> what is recorded of it.

    Raises:
        UsageError: an engine did not start.
        WrongAttentionError: an engine runs another attention than its method's.
    """
    running: dict[str, EngineProcess] = {}
    about: dict[str, dict[str, Any]] = {}
    for engine in chosen:
        report(f"starting the {engine.name} engine")
        make = partial(TurnsWorker, dummy=model.folder is None, max_context=max_context, max_batch=max_batch)
        process = EngineProcess(f"the {engine.name} engine", make, engine, folder, environment=IN_TURNS)
        running[engine.name] = stack.enter_context(process)
        found = process.ask("describe")
        attention = check_attention(engine.method, found.pop("report"))
        about[engine.name] = {"options": engine.method.options, "attention": attention, **found}
    return running, about


def measure(
    cases: list[Case],
    chosen: list[Engine],
    *,
    model: Model,
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
        max_context: tokens of context that the engines have room for.
        rounds: turns of each engine per case.
        steps: decode steps per turn.
        report: called with a line of text when something has been done.
    """
    max_batch = max(c.batch for c in cases)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = model.folder or Path(temporary)
        if model.folder is None:
            (folder / "config.json").write_text(json.dumps(model.config))
        running, about = start(stack, chosen, model, folder, max_context, max_batch, report)
        for case in cases:
            report(f"{case.context} tokens of context, batch {case.batch}")
            measured = measure_case(case, running, rounds=rounds, steps=steps)
            keys = {engine.name: key_of(case, engine, model, max_context) for engine in chosen}
            yield [
                {"bench": "engine", "key": keys[r["method"]], "model": model.name, **about[r["method"]], **r}
                for r in measured
            ]


def measure_case(case: Case, engines: Mapping[str, EngineProcess], *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time per output token of each engine, in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.ask("prepare", case)
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            measured = engine.ask("decode", steps)
            if turn:  # the first turn warms up
                times[name] += measured
    median_ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    bound = median_ms[DENSE] / median_ms[SKIPPED]
    return [
        {
            "method": name,
            **asdict(case),
            "threads": os.cpu_count(),
            "median_tpot_ms": round(median_ms[name], 3),
            "p10_tpot_ms": round(1e3 * statistics.quantiles(values, n=10)[0], 3),
            "p90_tpot_ms": round(1e3 * statistics.quantiles(values, n=10)[-1], 3),
            "speedup_vs_vllm": round(median_ms[DENSE] / median_ms[name], 3),
            "amdahl_bound": round(bound, 3),
            "share_of_bound": round(median_ms[DENSE] / median_ms[name] / bound, 3),
        }
        for name, values in times.items()
    ]


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
    console = make_console()
    model = Model.of(args.model, args.layers)
    chosen = engines(args.methods, args.options or ([] if args.methods else [DEFAULT_OPTIONS]), args.block_size)
    if args.out:
        check_out(args.out)
    if args.input_len is not None:
        return requests_bench.main(args, [engine.method for engine in chosen if not engine.skip_attention], model)
    model.check_length("--context", max(args.context), N_TAIL)
    cases = [Case(context=context, batch=batch) for context in args.context for batch in args.batch]
    max_context = max(args.context)
    keys = {case: [key_of(case, engine, model, max_context) for engine in chosen] for case in cases}
    known = recorded(args.out, [key for case in cases for key in keys[case]], again=args.again)
    todo = [case for case in cases if not all(key in known for key in keys[case])]
    records: list[dict[str, Any]] = []
    try:
        with console.status("") as status:
            measured = measure(
                todo,
                chosen,
                model=model,
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
    for column in ("ms", "p10 .. p90", "speed-up", "of the bound"):
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
        )
    return view
