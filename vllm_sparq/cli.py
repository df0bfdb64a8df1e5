"""The console script `vllm-sparq`. A command is a row of `COMMANDS` and a module with `add_arguments` and `main`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from types import ModuleType

from vllm_sparq import __version__
from vllm_sparq.console import UsageError

BENCHMARKS = "vllm_sparq.benchmarks"

COMMANDS = {
    "doctor": ("vllm_sparq.doctor.command", "say whether everything works here, and what options mean for a model"),
    "models": ("vllm_sparq.models.command", "real models by name: list them, get one, say where it is"),
    "demo": (f"{BENCHMARKS}.serving.demo", "two real `vllm serve`, SparQ and dense, answer the same questions"),
    "bench ops": (f"{BENCHMARKS}.ops.bench", "time the attention ops against dense ones on this machine"),
    "eval": (
        f"{BENCHMARKS}.quality.evaluate",
        "what compression costs in answers, on generated tasks and the papers'",
    ),
    "sweep": (f"{BENCHMARKS}.quality.sweep", "how few channels and tokens are enough: a grid of r and k"),
    "tune": (f"{BENCHMARKS}.tuning.tune", "find the setting for a model, a text and a machine"),
    "bench engine": (f"{BENCHMARKS}.engine.bench", "time per output token through the engine, beside dense"),
    "bench serve": (f"{BENCHMARKS}.serving.bench", "`vllm bench serve` against a `vllm serve` of each method"),
    "bench pressure": (f"{BENCHMARKS}.engine.pressure", "answers that outgrow the KV cache: evict or preempt"),
    "bench ray": (
        f"{BENCHMARKS}.cluster.bench",
        "offline generation on a pool of replicas, here or on a cluster",
    ),
    "research reads": (f"{BENCHMARKS}.simulation.reads", "policies of reading by their definitions, in plain torch"),
    "research kivi": (f"{BENCHMARKS}.simulation.kivi", "KIVI as its paper defines it, in plain torch"),
    "research retention": (f"{BENCHMARKS}.simulation.retention", "H2O and sinks + window by their definitions"),
    "research mass": (
        f"{BENCHMARKS}.quality.mass_curve",
        "answers against tokens read, by a mass or a fixed k",
    ),
    "research conversation": (f"{BENCHMARKS}.quality.conversation", "what prefix caching costs a conversation"),
    "research bits": (f"{BENCHMARKS}.quality.bits_per_byte", "bits per byte of a text, token by token"),
    "research positions": (f"{BENCHMARKS}.quality.positions", "bits per byte of text beyond a model's training"),
    "report": (f"{BENCHMARKS}.reporting.page", "one page with the tables and pictures of a folder of results"),
}
"""Words of the command -> module, one line of help. Only the module of the command in use is imported."""

GROUPS = {"bench": "measurements", "research": "what a method is worth, by its definition and in detail"}
"""First word of a command of two words -> one line of help."""

EXAMPLES = """\
examples:
  vllm-sparq doctor                      is everything in place on this machine?
  vllm-sparq doctor --model MODEL        what will be read, and what does each block format cost, for MODEL?
  vllm-sparq demo                        see it answer, beside dense attention

`vllm-sparq COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 if all is well, 1 if something is wrong, 2 for bad usage, 128 + n when stopped by signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, module = build_parser(words)
    args = parser.parse_args(words)
    if module is None:
        parser.error("give a command")
    from vllm_sparq import processes

    for stream in (sys.stdout, sys.stderr):  # a mark that it cannot say, or a file's name, ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with processes.raising_on_stop_signals():
            return int(module.main(args))
    except UsageError as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return 2
    except processes.Stopped as stopped:
        print(f"{args.prog}: stopped by {stopped}", file=sys.stderr)
        return stopped.exit_code


def build_parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser of all commands, filled in for the one that `words` begin with, and that one's module."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparq",
        description="Long contexts in vLLM: read few cached tokens, store them small, keep few.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-sparq {__version__}")
    top = parser.add_subparsers(metavar="COMMAND")
    inner = {}
    for group, text in GROUPS.items():
        group_parser = top.add_parser(group, help=text, description=text)
        inner[group] = group_parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = None
    for command, (path, text) in COMMANDS.items():
        *group_words, name = command.split()
        parent = inner[group_words[0]] if group_words else top
        command_parser = parent.add_parser(name, help=text, description=text)
        command_parser.formatter_class = argparse.RawDescriptionHelpFormatter
        command_parser.set_defaults(prog=f"vllm-sparq {command}")
        if list(words[: len(command.split())]) == command.split():
            chosen = importlib.import_module(path)
            chosen.add_arguments(command_parser)
    return parser, chosen
