"""`vllm-sparq doctor`: run every check, print the findings."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from vllm_sparq import compat
from vllm_sparq.backends import PRESETS
from vllm_sparq.config import NAMESPACE, Options, OptionsError, parse_options
from vllm_sparq.console import UsageError, check_model, given_options, serve_words
from vllm_sparq.doctor.engine import engine_section
from vllm_sparq.doctor.findings import Section
from vllm_sparq.doctor.machine import environment, implementations, platform_in_use, versions

EXAMPLES = """\
✓ is right, ✗ is wrong and says what to do about it, • is good to know. Exit code 0 if nothing is wrong, else 1.

examples:
  vllm-sparq doctor                                      also starts a small engine: half a minute
  vllm-sparq doctor --quick                              without the engine
  vllm-sparq doctor --model ./my-model --options '{"compression": 4}'
  vllm-sparq doctor --quick --model ./my-model --serve-args '["--tensor-parallel-size", "2"]'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For the command line."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--model", metavar="PATH", help="say what the options mean for this model (no weights are loaded)"
    )
    parser.add_argument(
        "--attention-backend",
        type=str.lower,
        choices=list(PRESETS),
        default="sparq",
        metavar="NAME",
        help=f"describe what this one does with the model, as it is started: {', '.join(PRESETS)} (default: sparq)",
    )
    parser.add_argument(
        "--options",
        type=given_options,
        default="{}",
        metavar="JSON",
        help="over its own, such as '{\"compression\": 4}'",
    )
    parser.add_argument(
        "--serve-args",
        type=serve_words,
        default=[],
        metavar="JSON",
        help="""more arguments of `vllm serve` for the model, as a list: '["--max-model-len", "8192"]'""",
    )
    parser.add_argument("--quick", action="store_true", help="do not start an engine")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    """Run every check, print the findings."""
    if args.model is not None:
        folder = check_model(args.model, hub_names=True)
        if not Path(args.model).expanduser().exists():  # a name of ours: the folder that it stands for
            args.model = str(folder)
    options = chosen_options(args)
    if args.serve_args and args.model is None:
        raise UsageError("--serve-args are those of an engine for a model: give --model as well")
    sections = []
    logging.disable(logging.CRITICAL)  # vLLM's, which repeats what the findings say
    try:
        for check in checks(args, options):
            with waiting(check.__doc__ or "", silent=args.json):
                section = run_check(check)
            sections.append(section)
            if not args.json:
                print_section(section)
    finally:
        logging.disable(logging.NOTSET)
    is_well = all(section.is_well for section in sections)
    if args.json:
        report = {"is_well": is_well, "sections": [asdict(section) for section in sections]}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        wrong = sum(finding.mark == "✗" for section in sections for finding in section.findings)
        print_verdict(wrong, args)
    return 0 if is_well else 1


def chosen_options(args: argparse.Namespace) -> Options:
    """What the backend and the options on the command line come to.

    Raises:
        UsageError: they cannot be used.
    """
    try:
        return parse_options({NAMESPACE: args.options}, args.attention_backend)
    except OptionsError as error:
        raise UsageError(f"--options: {error}") from None


def checks(args: argparse.Namespace, options: Options) -> list[Callable[[], Section]]:
    """What to look at, in order. Without a usable vLLM the rest has nothing to stand on."""
    chosen = [versions, environment]
    if compat.unsupported_vllm() is None:
        chosen += [platform_in_use, implementations]
        if args.model is not None:
            from vllm_sparq.doctor.model import model_section

            def model() -> Section:
                """reading the model's configuration"""
                return model_section(args.model, options, args.attention_backend, args.serve_args)

            chosen.append(model)
        if not args.quick:
            chosen.append(engine_section)
    return chosen


def run_check(check: Callable[[], Section]) -> Section:
    """A check that fails in a way nobody thought of is a finding, too."""
    try:
        return check()
    except Exception as error:  # whatever vLLM raises while it is imported or configured
        section = Section(check.__name__.replace("_", " "))
        section.bad(f"{type(error).__name__}: {error}")
        return section


@contextlib.contextmanager
def waiting(text: str, *, silent: bool) -> Iterator[None]:
    """A spinner with the elapsed time, where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text)
        yield


def print_section(section: Section) -> None:
    """For people."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{section.title}[/]")
    for finding in section.findings:
        style = {"✓": "green", "✗": "bold red", "•": "yellow"}[finding.mark]
        first, *rest = finding.text.splitlines()
        console.print(Text.assemble("  ", (finding.mark, style), " ", first))
        for line in rest:
            console.print(Text(f"    {line}"))
    console.print()


def print_verdict(n_wrong: int, args: argparse.Namespace) -> None:
    """The last line: how many things are wrong, or the command that will work."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    if n_wrong:
        text = "1 thing is" if n_wrong == 1 else f"{n_wrong} things are"
        console.print(f"[bold red]✗[/] {text} wrong: look for ✗ above.")
        return
    model = "..." if args.model is None else shlex.quote(args.model)
    chosen = ["--attention-backend", args.attention_backend]
    if args.options:
        chosen += ["--additional-config", json.dumps({NAMESPACE: args.options})]
    line = f"vllm serve {model} {shlex.join(chosen + args.serve_args)}"
    console.print(f"[bold green]✓[/] All is well: {escape(line)}", markup=True)
