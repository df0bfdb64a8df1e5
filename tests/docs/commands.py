"""The commands that documents show, and whether they can work as written."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import yaml

from tests.docs.markdown import ROOT, code_lines, files_and_folders, inline_code
from vllm_sparq import cli
from vllm_sparq.attention_backends.choices import OFF, asked_for, chosen
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.backends import PRESETS
from vllm_sparq.config import NAMESPACE, OptionsError, parse_options
from vllm_sparq.reads import HeadShape

PROGRAMS = ("vllm-sparq", "vllm", "make", "pip", "python", ".venv/bin/pytest", "serve", "pre-commit")
"""First words of what a reader may paste."""


def commands(text: str) -> Iterator[str]:
    """Every command of a document, in blocks and between backticks, without variables set before it."""
    for code in (*code_lines(text), *inline_code(text)):
        command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", code)
        program, _, rest = command.partition(" ")
        if program in PROGRAMS and rest:
            yield command


def problem(command: str) -> str | None:
    """Why a command cannot work as written; None if nothing speaks against it."""
    words = shlex.split(command)
    if words[0] == "vllm-sparq":
        return parsing_problem(words[1:])
    if words[0] == "vllm":
        return serving_problem(words[1:])
    if words[0] == "make":
        return making_problem(words[1:])
    if words[:2] == ["python", "-m"]:
        module = words[2].rstrip(".")
        return None if importlib.util.find_spec(module) else f"there is no module {module}"
    if words[0] in ("python", ".venv/bin/pytest", "serve"):
        return script_problem(words[1:])
    if words[0] == "pip":
        local = [word.partition("[")[0] for word in words[2:] if word.startswith(".")]
        return next((f"{path} is no package" for path in local if not (ROOT / path / "pyproject.toml").exists()), None)
    return None


def script_problem(words: list[str]) -> str | None:
    """Paths that do not exist; flags that our script says nothing of."""
    for word in words:
        if "/" in word and not word.startswith("-") and word not in files_and_folders():
            return f"{word} does not exist"
    if words[0].endswith(".py"):
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        return next(
            (f"{words[0]} has no {word}" for word in words if word.startswith("--") and word not in source), None
        )
    return None


def parsing_problem(words: list[str]) -> str | None:
    """What our own command line says to these words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parser, module = cli.build_parser(words)
            parser.parse_args(words)
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    return None if module is not None else "it names no command"


def making_problem(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    return next((f"there is no target {word}" for word in words if word not in targets), None)


def made_by_ci(event: str) -> list[str]:
    """What the workflow's jobs call `make` for when an event starts it: all of them, or those that name this one."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert event in workflow[True], f"ci.yml knows no {event}"  # YAML 1.1 reads the key `on` as a boolean
    jobs = [job for job in workflow["jobs"].values() if event in job.get("if", event)]
    commands = [step.get("run", "") for job in jobs for step in job["steps"]]
    return [command.removeprefix("make ") for command in commands if command.startswith("make ")]


def serving_problem(words: list[str]) -> str | None:
    """A backend of ours, and options that it takes; vLLM's own flags are run by the engine tests."""
    if words[0] != "serve":
        return None
    given = {flag: value for flag, value in pairwise(words) if flag.startswith("--")}
    backend = given.get("--attention-backend", "sparq")
    if backend not in PRESETS:
        return f"{backend} is no backend of ours"
    return options_problem(json.loads(given.get("--additional-config", "{}")), backend)


def is_choice(given: Mapping[str, Any]) -> bool:
    """Whether this is what a request chooses for itself, and not options of an engine."""
    return given.get(NAMESPACE) == OFF or any(name.startswith(f"{NAMESPACE}.") for name in given)


def choice_problem(given: Mapping[str, Any]) -> str | None:
    """Why a request of an engine that reads as `sparq` does cannot have this."""
    engine = PagedEngine(backend="sparq", options=parse_options({}), block_size=128)
    try:
        chosen(engine, HeadShape(head_size=128, n_heads=32, n_kv_heads=8), asked_for(given))
    except OptionsError as error:
        return str(error)
    return None


def options_problem(given: Mapping[str, Any], *backends: str) -> str | None:
    """Why none of these backends (all, if none is named) takes the options, with or without their namespace."""
    config = given if list(given) == [NAMESPACE] else {NAMESPACE: dict(given)}
    said = None
    for backend in backends or PRESETS:
        try:
            parse_options(config, backend)
        except OptionsError as error:
            said = said or str(error)
        else:
            return None
    return said


def served(command: str) -> tuple[str, dict[str, Any]]:
    """Backend and options of a `vllm serve` command."""
    words = shlex.split(command)
    given = dict(pairwise(words))
    return given["--attention-backend"], json.loads(given.get("--additional-config", "{}")).get(NAMESPACE, {})
