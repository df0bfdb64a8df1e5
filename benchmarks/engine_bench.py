"""Time per output token through the engine: SparQ against vLLM's own backend and against no attention at all.

    vllm-sparq bench engine --context 32768 --batch 1,4,8

Three engines on one dummy-weight model of a real model's shape, each in a process of its own, decode in turns: one
decodes while the others wait, round after round, so that all see the same machine. The third engine skips the attention
op of its decode steps; its time is what no attention kernel can beat, and dense time over its time is the Amdahl bound
of any speed-up.

All requests of a batch share one prompt through prefix caching, so the context is prefilled once. The attention of that
prefill is skipped too, everywhere alike: K and V are written, and what they hold does not change how long a read takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.records import append_records, provenance
from vllm_sparq.cli import comma_numbers

LLAMA_1B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=True,
    dtype="bfloat16",
)
"""The shape of Llama-3.2-1B; the number of layers is an option."""

DEFAULT_OPTIONS = {"r": 16, "k": 128}
DENSE, SKIPPED = "dense", "no attention"

N_TAIL = 1024
"""Room for answers behind the context (tokens): more than all rounds of a case decode."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. ``context`` in tokens, ``batch`` in requests."""

    context: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One engine: its backend, its options, and whether its decode steps skip the attention op."""

    name: str
    backend: str
    options: dict[str, Any]
    skip_attention: bool = False


def methods(options: list[dict[str, Any]]) -> list[Method]:
    """The engines that decode in turns: dense, no attention at all, then sparq with each set of options."""
    return [
        Method(name=DENSE, backend="CPU_ATTN", options={}),
        Method(name=SKIPPED, backend="CPU_ATTN", options={}, skip_attention=True),
        *(Method(name=f"sparq {json.dumps(chosen)}", backend="SPARQ", options=chosen) for chosen in options),
    ]


class SkippedAttention:
    """Replaces `forward` of an attention implementation: writes K and V, and attends only where asked to."""

    def __init__(self, impl: Any, *, decode: bool) -> None:
        self.attend, self.decode = impl.forward, decode
        self.write = getattr(impl, "_write", None)

    def __call__(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, meta: Any, output: Any, **kw: Any
    ) -> Any:
        if meta is None or (self.decode and int(meta.query_start_loc.diff().max()) == 1):
            return self.attend(layer, query, key, value, kv_cache, meta, output=output, **kw)
        if self.write is not None:  # our backends write inside of forward, vLLM's before it
            pages = layer.impl._bind(layer, kv_cache, query.dtype)
            self.write(key, value, pages, meta.block_table, meta.query_start_loc, meta.seq_lens)
        return output.fill_(0)


def serve_turns(method: Method, model: Path, max_context: int, max_batch: int, pipe: Connection) -> None:
    """The process of one engine: prepares a batch when told to, and decodes when it is its turn."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_WAIT_POLICY="passive",  # waiting engines must not burn the cores of the one that decodes
    )
    import torch
    from vllm import LLM, SamplingParams

    config = json.loads((model / "config.json").read_text())
    dense_bytes_per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    # The shared prompt, a tail of its own for each request, and room for our larger pages.
    kv_bytes = dense_bytes_per_token * (max_context + N_TAIL * (max_batch + 2)) * 5 // 4
    llm = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max_context + N_TAIL,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=kv_bytes,
        attention_backend=method.backend,
        additional_config={"sparq": method.options},
        disable_log_stats=True,
    )
    engine: Any = llm.llm_engine
    for layer in engine.vllm_config.compilation_config.static_forward_context.values():
        layer.impl.forward = SkippedAttention(layer.impl, decode=not method.skip_attention)
    pipe.send("ready")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(10, 1000, (max_context,), generator=generator).tolist()
    params = SamplingParams(temperature=0, max_tokens=N_TAIL - 64, ignore_eos=True, detokenize=False)
    while (order := pipe.recv()) is not None:
        kind, argument = order
        if kind == "prepare":
            running = [request.request_id for request in engine.output_processor.request_states.values()]
            engine.abort_request(running)
            for i in range(argument.batch):
                name = f"{argument.context}-{argument.batch}-{i}"
                engine.add_request(name, {"prompt_token_ids": prompt[: argument.context]}, params)
            started = 0
            while started < argument.batch:  # until every request has decoded its first token
                started += sum(len(out.outputs[0].token_ids) == 1 for out in engine.step())
            pipe.send(None)
        else:
            times = []
            for _ in range(argument):
                begin = time.perf_counter()
                engine.step()
                times.append(time.perf_counter() - begin)
            pipe.send(times)


def measure(
    cases: list[Case], options: list[dict[str, Any]], *, n_layers: int, rounds: int, steps: int, report: Any
) -> list[dict[str, Any]]:
    """All cases, with the engines in turns; one record a case and method.

    Args:
        cases: contexts and batches.
        options: sets of sparq options, an engine each.
        n_layers: of the model.
        rounds: turns of each engine per case.
        steps: decode steps per turn.
        report: called with a line of text when something has been done.
    """
    context = multiprocessing.get_context("spawn")
    max_context, max_batch = max(c.context for c in cases), max(c.batch for c in cases)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        (model / "config.json").write_text(json.dumps({**LLAMA_1B, "num_hidden_layers": n_layers}))
        engines: dict[str, Connection] = {}
        for method in methods(options):
            report(f"starting the {method.name} engine")
            ours, theirs = context.Pipe()
            arguments = (method, model, max_context, max_batch, theirs)
            context.Process(target=serve_turns, args=arguments, daemon=True).start()
            theirs.close()
            engines[method.name] = ours
            ours.recv()
        records = []
        for case in cases:
            report(f"{case.context} tokens of context, batch {case.batch}")
            records += measure_case(case, engines, n_layers=n_layers, rounds=rounds, steps=steps)
        for pipe in engines.values():
            pipe.send(None)
    return records


def measure_case(
    case: Case, engines: dict[str, Connection], *, n_layers: int, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Time per output token of each engine, in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for pipe in engines.values():
        pipe.send(("prepare", case))
        pipe.recv()
    for turn in range(rounds + 1):
        for name, pipe in engines.items():
            pipe.send(("decode", steps))
            measured = pipe.recv()
            if turn:  # the first turn warms up
                times[name] += measured
    median_ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    bound = median_ms[DENSE] / median_ms[SKIPPED]
    return [
        {
            "bench": "engine",
            "method": name,
            **asdict(case),
            "model": f"Llama-3.2-1B shape, {n_layers} layers, dummy weights",
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
    parser.add_argument("--context", type=comma_numbers, default=[32768], help="tokens of context, comma-separated")
    parser.add_argument("--batch", type=comma_numbers, default=[1, 4], help="requests at a time, comma-separated")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default 4 of the real 16)")
    parser.add_argument(
        "--options",
        type=json.loads,
        action="append",
        metavar="JSON",
        help='sparq options; may be repeated, an engine each (default: {"r": 16, "k": 128})',
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine per case (default 5)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps per turn (default 8)")
    parser.add_argument("--out", type=Path, help="append one JSON line per case and method to this file")


def main(args: argparse.Namespace) -> int:
    """Measure, print the table, write the lines."""
    from rich.console import Console

    console = Console()
    cases = [Case(context=context, batch=batch) for context in args.context for batch in args.batch]
    with console.status("") as status:
        records = measure(
            cases,
            args.options or [DEFAULT_OPTIONS],
            n_layers=args.layers,
            rounds=args.rounds,
            steps=args.steps,
            report=lambda line: status.update(f"{line} ..."),
        )
    if args.out:
        origin = provenance()
        append_records(args.out, [{**record, **origin} for record in records])
    console.print(table(records))
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
        slower = ", slower than dense" if record["speedup_vs_vllm"] < 1 else ""
        view.add_row(
            f"{record['context']:,}",
            str(record["batch"]),
            record["method"],
            f"{record['median_tpot_ms']:.1f}",
            f"{record['p10_tpot_ms']:.1f} .. {record['p90_tpot_ms']:.1f}",
            f"{record['speedup_vs_vllm']:.2f}x{slower}",
            f"{record['share_of_bound']:.0%}",
        )
    return view
