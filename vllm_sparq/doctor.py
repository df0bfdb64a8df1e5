"""`vllm-sparq doctor`: is everything in place here, and what do the options mean for a model?"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vllm_sparq import __version__, compat
from vllm_sparq.cli import UsageError, sparq_options

EXAMPLES = """\
✓ is right, ✗ is wrong and says what to do about it, • is good to know. Exit code 0 if nothing is wrong, else 1.

examples:
  vllm-sparq doctor                                      also starts a small engine: half a minute
  vllm-sparq doctor --quick                              without the engine
  vllm-sparq doctor --model ./my-model --options '{"compression": 4}'
"""

Mark = Literal["✓", "✗", "•"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: Mark
    text: str


@dataclass
class Section:
    """A heading with its findings, and numbers for programs where there are some."""

    title: str
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def good(self, text: str) -> None:
        self.findings.append(Finding("✓", text))

    def bad(self, text: str) -> None:
        self.findings.append(Finding("✗", text))

    def note(self, text: str) -> None:
        self.findings.append(Finding("•", text))

    @property
    def is_well(self) -> bool:
        return all(finding.mark != "✗" for finding in self.findings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For the command line."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--model", metavar="PATH", help="say what the options mean for this model (no weights are loaded)"
    )
    parser.add_argument(
        "--options", type=sparq_options, default="{}", metavar="JSON", help="of SparQ, such as '{\"compression\": 4}'"
    )
    parser.add_argument("--quick", action="store_true", help="do not start an engine")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def main(args: argparse.Namespace) -> int:
    """Run every check, print the findings."""
    if args.model is not None:
        check_model_path(args.model)
    sections = []
    logging.disable(logging.CRITICAL)  # vLLM's, which repeats what the findings say
    try:
        for check in checks(args):
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
        print_verdict(wrong)
    return 0 if is_well else 1


def checks(args: argparse.Namespace) -> list[Callable[[], Section]]:
    """What to look at, in order. Without a usable vLLM the rest has nothing to stand on."""
    chosen = [versions, environment]
    if compat.unsupported_vllm() is None:
        chosen += [platform_in_use, implementations]
        if args.model is not None:
            from vllm_sparq.model_report import model_section

            def model() -> Section:
                """reading the model's configuration"""
                return model_section(args.model, args.options)

            chosen.append(model)
        if not args.quick:
            chosen.append(engine)
    return chosen


def run_check(check: Callable[[], Section]) -> Section:
    """A check that fails in a way nobody thought of is a finding, too."""
    try:
        return check()
    except Exception as error:  # whatever vLLM raises while it is imported or configured
        section = Section(check.__name__.replace("_", " "))
        section.bad(f"{type(error).__name__}: {error}")
        return section


def versions() -> Section:
    """looking at versions"""
    section = Section("versions")
    section.good(f"vllm-sparq {__version__}, Python {platform.python_version()}")
    problem = compat.unsupported_vllm()
    supported = ",".join(sorted(map(str, compat.SUPPORTED_VLLM), reverse=True))
    if problem is None:
        section.good(f"vllm {compat.vllm_version()}, in the supported range {supported}")
    else:
        section.bad(problem)
    for name, why in (("torch", "vLLM needs it"), ("triton", "only CUDA devices need it")):
        found = installed(name)
        if found is not None:
            section.good(f"{name} {found}")
        else:
            section.note(f"{name} is not installed: {why}")
    return section


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> Section:
    """looking at entry points and environment variables"""
    section = Section("plugin")
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        names = {entry.name: entry.value for entry in metadata.entry_points(group=group)}
        ours = names.pop("sparq", None)
        if ours is None:
            section.bad(
                f"entry point sparq of {group} is missing, so vLLM cannot find us: pip install vllm-sparq again"
            )
        else:
            section.good(f"entry point sparq of {group}: {ours}")
        if names and group == "vllm.platform_plugins":
            section.note(f"other platform plugins: {', '.join(names)}; vLLM allows one of them to be active")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        section.good("VLLM_PLUGINS is not set: vLLM loads every plugin")
    elif "sparq" in allowed.split(","):
        section.good(f"VLLM_PLUGINS={allowed} names sparq")
    else:
        section.bad(f"VLLM_PLUGINS={allowed!r} switches vllm-sparq off: unset it, or add sparq to it")
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        section.bad("VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins, and SparQ is refused: unset it")
    for name in ("VLLM_SPARQ_IMPL", "VLLM_SPARQ_ISA", "VLLM_SPARQ_LIBRARIES"):
        if os.environ.get(name):
            section.note(f"{name}={os.environ[name]} overrides which implementation runs: unset it when done debugging")
    return section


def platform_in_use() -> Section:
    """importing vLLM"""
    from vllm.platforms import current_platform

    section = Section("device")
    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if getattr(current_platform, "serves_sparq", False):
        section.good(f"vLLM uses our platform: {name}")
    else:
        section.bad(
            f"vLLM uses {name}, not ours: vllm-sparq runs on CPU and CUDA; see the section above for the reason"
        )
    device = current_platform.device_type
    section.numbers = {"platform": name, "device": device}
    if device == "cpu":
        describe_cpu(section)
    else:
        section.good(f"{device}: {current_platform.get_device_name()}")
    return section


def describe_cpu(section: Section) -> None:
    """Name, cores and instruction sets."""
    from vllm_sparq.ops import native

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    section.good(f"cpu: {model}, {usable} cores for us")
    flags = native.cpu_flags()
    found = [name for name, needs in native.INSTRUCTION_SETS.values() if needs <= flags]
    if found:
        section.good(f"instruction sets with compiled kernels: {', '.join(found)}")
    else:
        section.bad("this CPU has no AVX2, which every compiled kernel needs")
    section.numbers |= {"cpu": model, "cores": usable, "instruction_sets": found}


def implementations() -> Section:
    """choosing implementations"""
    from vllm.platforms import current_platform

    from vllm_sparq.ops import dispatch

    section = Section("operations")
    for op in dispatch.IMPLEMENTATIONS:
        try:
            choice = dispatch.choose(op, current_platform.device_type)
            choice.load()
            if choice.implementation == "cpu":
                check_kernel(op)
        except (ValueError, NotImplementedError, ImportError, AttributeError, OSError) as error:
            section.bad(f"{op}: {error}")
            continue
        text = f"{op}: {choice.implementation} ({choice.reason})"
        section.numbers[op] = {"implementation": choice.implementation, "reason": choice.reason}
        forced = bool(os.environ.get(dispatch.OVERRIDE))
        if choice.implementation != "reference":
            section.good(text)
        elif forced:
            section.note(text)
        else:
            section.bad(text)
    return section


def check_kernel(op: str) -> None:
    """The compiled library can be older than the code that calls it.

    Raises:
        AttributeError: it does not have the kernel of this op.
        OSError: it cannot be loaded.
    """
    from vllm_sparq.ops import native

    if not hasattr(native.library(), f"sparq_{op}"):
        raise AttributeError(
            f"{native.find().library} is older than this version and lacks it: install vllm-sparq again"
        )


def engine() -> Section:
    """starting a small engine (half a minute)"""
    from vllm_sparq.engine_check import EngineError, check_engine

    section = Section("engine")
    folder = Path(tempfile.mkdtemp(prefix="vllm-sparq-doctor-"))
    try:
        report = check_engine(folder)
    except EngineError as error:
        section.bad(str(error))
        return section
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    section.numbers = report
    layers = report["layers"].values()
    classes = sorted({f"{layer['impl']} (backend {layer['backend']})" for layer in layers})
    if layers and all(layer["backend"] == "SPARQ" for layer in layers):
        section.good(f"spawned engine core and worker; the worker's {len(layers)} layers run {', '.join(classes)}")
    else:
        section.bad(f"asked for SparQ, but the worker runs {', '.join(classes) or 'no attention layer'}")
    section.good(
        f"it generated {report['n_tokens']} tokens; {report['seconds']:.0f} s in all, nearly all of it imports"
    )
    return section


def check_model_path(model: str) -> None:
    """A folder must exist; a name of the hub is vLLM's business.

    Raises:
        UsageError: no such folder, or nothing in it.
    """
    folder = Path(model).expanduser()
    is_hub_name = model.count("/") == 1 and model[0] not in "./~"
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"--model {model}: there is no config.json in it; give the folder of a Hugging Face model")
    elif not is_hub_name:
        raise UsageError(
            f"--model {model}: no such folder; give the folder of a model, or its name on the hub (org/name)"
        )


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


def print_verdict(n_wrong: int) -> None:
    """The last line."""
    from rich.console import Console

    if n_wrong:
        text = "1 thing is" if n_wrong == 1 else f"{n_wrong} things are"
        Console().print(f"[bold red]✗[/] {text} wrong: look for ✗ above.")
    else:
        Console().print("[bold green]✓[/] All is well: vllm serve MODEL --attention-backend sparq")
