"""`vllm-sparq demo`: one `vllm serve` with SparQ and one with vLLM's own attention answer the same questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_sparq.benchmarks.common.lines import check_out, replace_text
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.server import (
    WORKER_REPORT,
    Completion,
    Server,
    ServerError,
    is_taken,
    wait_until_healthy,
)
from vllm_sparq.benchmarks.quality.cache_bytes import kept_tokens
from vllm_sparq.benchmarks.serving.demo_report import Row, Run, Side, print_run, run_as_json
from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.config import Options
from vllm_sparq.console import (
    UsageError,
    check_model,
    make_console,
    natural,
    place,
    positive,
    sparq_options,
    whole_number,
)
from vllm_sparq.reads import Read

LENGTHS = (512, 1024, 2048, 3900)
ASKED = ("needle", "repetition")
START_TIMEOUT_S = 300.0

SMALL_MODEL = {"OMP_NUM_THREADS": "1"}
"""For the bundled model, whose steps are shorter than it takes threads to meet where other programs run as well."""

SERVE_ARGUMENTS = (
    "--enforce-eager",  # starts in half the time
    *("--kv-cache-memory-bytes", str(128 * 2**20)),
    *("--gpu-memory-utilization", "0.4"),  # of a GPU, where two servers have to fit
    *("--max-num-seqs", "4"),
)

EXAMPLES = """\
Starts two servers, asks both the same generated questions through the OpenAI API, and prints their answers, how many
cached tokens each decode step read, and which attention class really ran inside the workers. Exit code 1 if the class
is not ours. Everything stays on this machine, and no process is left behind.

examples:
  vllm-sparq demo
  vllm-sparq demo --lengths 1024 3900 --questions 2 --sparq '{"compression": 4}'
  vllm-sparq demo --model ./my-model --lengths 16000 --json answers.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For the command line."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--model", type=place, default=WEIGHTS, metavar="PATH", help="model folder; default: the bundled one"
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=list(LENGTHS),
        metavar="TOKENS",
        help=f"context lengths; default: {' '.join(map(str, LENGTHS))}",
    )
    parser.add_argument("--questions", type=positive, default=4, metavar="N", help="questions per length; default: 4")
    parser.add_argument("--seed", type=natural, default=0, help="of the questions; default: 0")
    parser.add_argument(
        "--sparq",
        type=sparq_options,
        default='{"dense_below": 0}',
        metavar="JSON",
        help="options of SparQ; default: '{\"dense_below\": 0}', so that short contexts are read sparsely as well",
    )
    parser.add_argument("--json", type=place, metavar="FILE", help="write everything that was found there")
    parser.add_argument(
        "--port", type=whole_number(1, 65534), metavar="PORT", help="first of two ports; default: free ones"
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo."""
    check_out(args.json, "--json")
    started = time.monotonic()
    args.model = check_model(args.model)
    if not (args.model / "tokenizer.json").is_file():
        raise UsageError(
            f"--model {args.model}: there is no tokenizer.json in it; give a folder with config.json, weights and "
            "tokenizer"
        )
    shape = ModelShape.of(args.model)
    try:
        read = args.sparq.read_of(shape.heads)
    except ValueError as error:
        raise UsageError(f"--sparq: {error}") from None
    for port in () if args.port is None else (args.port, args.port + 1):
        if is_taken(port):
            raise UsageError(
                f"--port {args.port}: the servers need {args.port} and {args.port + 1}, and another program listens on "
                f"{port}: give another, or leave --port out for free ones"
            )
    examples = make_questions(args.model, shape, args.lengths, args.questions, args.seed)
    console = make_console()
    folder = Path(tempfile.mkdtemp(prefix="vllm-sparq-demo-"))
    keep_logs = False
    try:
        sides, rows = serve_and_ask(args, examples, lambda n: tokens_read(args.sparq, read, shape, n), folder, console)
    except ServerError as error:
        keep_logs = True
        console.print(f"✗ {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    finally:
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)
    run = Run(
        model=args.model,
        bundled=args.model == WEIGHTS,
        options=args.sparq,
        read=read,
        heads=shape.heads,
        sides=sides,
        rows=rows,
        seconds=time.monotonic() - started,
    )
    print_run(console, run)
    if args.json is not None:
        replace_text(args.json, json.dumps(run_as_json(run), indent=2, ensure_ascii=False) + "\n")
    return 0


def make_questions(
    model: Path, shape: ModelShape, lengths: Sequence[int], n_questions: int, seed: int
) -> list[tasks.Example]:
    """`n_questions` per length, needle and repetition in turn, spread evenly over the depths of the context."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    examples: list[tasks.Example] = []
    for length in sorted(set(lengths)):
        for i in range(n_questions):
            try:
                example = tasks.make_example(
                    ASKED[i % len(ASKED)],
                    n_tokens=length,
                    count_tokens=lambda text: len(tokenizer.encode(text).ids),
                    seed=1000 * seed + len(examples),
                    depth=(i + 0.5) / n_questions,
                )
            except ValueError as error:
                raise UsageError(f"--lengths {length}: {error}") from None
            needed = example.n_prompt_tokens + example.max_tokens
            if needed > shape.max_model_len:
                raise UsageError(
                    f"--lengths {length} with its answer takes {needed} tokens, and the model has positions for "
                    f"{shape.max_model_len}: use {length - (needed - shape.max_model_len)} or less"
                )
            examples.append(example)
    return examples


def tokens_read(options: Options, read: Read, shape: ModelShape, context_len: int) -> int:
    """Cached tokens that a decode step reads per KV head, on average over the layers; with a mass the most.

    No more than are kept, where tokens are evicted. With lossless every answer is verified, over all tokens.
    """
    context_len = kept_tokens(options, context_len)
    if options.lossless or read.is_dense(context_len):
        return context_len
    n_dense = min(options.dense_layers, shape.n_layers)
    n_sparse = shape.n_layers - n_dense
    return round((n_dense * context_len + n_sparse * read.n_selected(context_len)) / shape.n_layers)


def serve_and_ask(
    args: argparse.Namespace,
    examples: Sequence[tasks.Example],
    n_read: Callable[[int], int],
    folder: Path,
    console: Console,
) -> tuple[dict[str, Side], list[Row]]:
    """Start both servers, look into their workers, ask everything, stop them.

    Raises:
        ServerError: a server failed; its log is kept.
    """
    additional = json.dumps({"sparq": args.sparq.model_dump(exclude_defaults=True)})
    threads = SMALL_MODEL if args.model == WEIGHTS else {}
    sparq = Server(
        "sparq",
        args.model,
        [*SERVE_ARGUMENTS, "--attention-backend", "sparq", "--additional-config", additional],
        folder=folder,
        port=args.port,
        environment=threads,
    )
    dense = Server(
        "dense",
        args.model,
        [*SERVE_ARGUMENTS, "--worker-extension-cls", WORKER_REPORT],
        folder=folder,
        port=args.port and args.port + 1,
        environment=threads,
    )
    with spinner(console) as say, contextlib.ExitStack() as stack:
        say("starting vllm serve, with SparQ and with dense attention")
        for server in (sparq, dense):
            stack.enter_context(server)
        wait_until_healthy(
            [sparq, dense], timeout_s=START_TIMEOUT_S, on_ready=lambda server: say(f"{server.name} is ready")
        )
        sides = {server.name: Side(server.attention_report()) for server in (sparq, dense)}
        if problem := sides["sparq"].problem(ours=True) or sides["dense"].problem(ours=False):
            raise sparq.error(problem)
        for server in (sparq, dense):
            say(f"warming up {server.name}")
            server.complete(examples[-1].prompt[1:], max_tokens=8)  # another prefix than the question's
        rows = []
        for i, example in enumerate(examples):
            say(f"question {i + 1} of {len(examples)}: {example.task} in {example.n_prompt_tokens:,} tokens")
            # One at a time, and each server first in turn, so that the times are comparable.
            order = (sparq, dense) if i % 2 == 0 else (dense, sparq)
            answers = {server.name: ask(server, example) for server in order}
            context_len = answers["sparq"].n_prompt_tokens + 1
            rows.append(Row(example, answers["sparq"], answers["dense"], n_read(context_len), context_len))
        say("stopping the servers")
    return sides, rows


def ask(server: Server, example: tasks.Example) -> Completion:
    """The server's answer."""
    return server.complete(example.prompt, max_tokens=example.max_tokens, stop=example.stop)


@contextlib.contextmanager
def spinner(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on and for how long; plain lines where nobody looks."""
    if not console.is_terminal:
        start = time.monotonic()
        yield lambda text: console.print(f"{time.monotonic() - start:5.0f} s  {text}", highlight=False)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        line = progress.add_task("")
        yield lambda text: progress.update(line, description=text)
