"""What every command says and takes alike: usage errors, the terminal, argument types, the folder of a model.

Modules below the command line import this one, never `vllm_sparq.cli`, which imports them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparq.config import Options

WIDTH = 130
"""Columns of the output where it goes to a file or a pipe: enough for the widest table."""


class UsageError(ValueError):
    """What the user asked for cannot be done as written; said in one line, exit code 2."""


def make_console() -> Any:
    """A `rich` console: the terminal, or lines of `WIDTH` for a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def comma_names(text: str) -> list[str]:
    """For argparse: words, comma-separated."""
    return text.split(",")


def comma_numbers(text: str) -> list[int]:
    """For argparse: whole numbers, comma-separated."""
    return [int(part) for part in text.split(",")]


def comma_shares(text: str) -> list[float]:
    """For argparse: shares above 0 and below 1, comma-separated."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < share < 1 for share in found):  # nan is not, either
        raise argparse.ArgumentTypeError(f"{text} is not usable: give shares above 0 and below 1, as in 0.9,0.99")
    return found


def json_object(text: str) -> dict[str, Any]:
    """For argparse: a JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"compression\": 4}}'")
    return found


def given_options(text: str) -> dict[str, Any]:
    """For argparse: a JSON object of options, with or without the key "sparq" around it; not checked yet."""
    from vllm_sparq.config import NAMESPACE

    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON ({error}): write for example '{{\"compression\": 4}}', in single quotes"
        ) from None
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be an object of options: write for example '{{\"compression\": 4}}'"
        )
    found: Any = given[NAMESPACE] if list(given) == [NAMESPACE] else given
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r}: "{NAMESPACE}" must be an object of options, such as {{"compression": 4}}'
        )
    return found


def sparq_options(text: str) -> Options:
    """For argparse: the options of ``--attention-backend sparq`` in a JSON object."""
    from vllm_sparq.config import NAMESPACE, OptionsError, parse_options

    try:
        return parse_options({NAMESPACE: given_options(text)})
    except OptionsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_model(model: str | Path, *, hub_names: bool = False) -> Path:
    """The folder of a model; with ``hub_names``, an ``org/name`` that is no folder passes as it is.

    Raises:
        UsageError: there is no such folder, or no config.json in it.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_dir():
        raise UsageError(
            f"--model {model}: there is no config.json in it; give a folder with config.json, weights and tokenizer"
        )
    if hub_names and str(model).count("/") == 1 and str(model)[0] not in "./~":
        return folder
    remedy = (
        "or a name of the hub (org/name)" if hub_names else "(a model of the hub must be downloaded to a folder first)"
    )
    raise UsageError(f"--model {model}: no such folder; give a folder with config.json, weights and tokenizer {remedy}")
