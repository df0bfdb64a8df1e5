"""What every command says and takes alike: usage errors, the terminal, argument types, the folder of a model.

Modules below the command line import this one, never `vllm_sparq.cli`, which imports them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparq.config import Options

N_SHOWN = 60
"""Characters of a value that a message repeats."""

WIDTH = 130
"""Columns of the output where it goes to a file or a pipe: enough for the widest table."""


MOST = 2**31 - 1
"""The largest whole number that is taken where nothing says less."""

DTYPES = ("bfloat16", "float16", "float32", "auto")
"""Element types that engines of ours run in, as vLLM names them; auto: the one that the model names."""

OPTIONS_EXAMPLE = '{"compression": 4}'
WORDS_EXAMPLE = '["--dtype", "auto"]'
ARGUMENTS_EXAMPLE = '{"max_model_len": 4096}'
"""JSON that a message shows, by what its argument takes: options, words of `vllm serve`, arguments of vLLM's."""


class UsageError(ValueError):
    """What the user asked for cannot be done as written; said in one line, exit code 2."""


def shown(text: str) -> str:
    """What the user wrote, for a message of one line."""
    return repr(text if len(text) <= N_SHOWN else text[:N_SHOWN] + "...")


def make_console() -> Any:
    """A `rich` console: the terminal, or lines of `WIDTH` for a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def whole_number(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """For argparse: a whole number within limits."""

    def parsed(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None
        if not least <= found <= most:
            rule = f"{least} or more" if found < least else f"{most} or less"
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {rule}")
        return found

    return parsed


positive, natural = whole_number(1), whole_number(0)


def real_number(
    *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """For argparse: a finite number, at ``least`` so large, larger than ``above``, and at ``most`` so large."""

    def parsed(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
        if found < least:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {least:g} or more")
        if found <= above:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be above {above:g}")
        if found > most:
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {most:g} or less")
        return found

    return parsed


def place(text: str) -> Path:
    """For argparse: a path that the system can look up, whether something is there or not."""
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"{shown(text)} is no path: {reason}") from None
    return Path(text)


def comma_names(text: str) -> list[str]:
    """For argparse: words, comma-separated."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{shown(text)} holds an empty name: give names such as sparq,kivi")
    return found


def comma_numbers(text: str) -> list[int]:
    """For argparse: whole numbers above 0, comma-separated."""
    return [positive(part) for part in text.split(",")]


def comma_shares(text: str) -> list[float]:
    """For argparse: shares above 0 and below 1, comma-separated."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < share < 1 for share in found):  # nan is not, either
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not usable: give shares above 0 and below 1, as in 0.9,0.99"
        )
    return found


def json_value(text: str, example: str = OPTIONS_EXAMPLE) -> Any:
    """Whatever a JSON text says; ``example`` is what its argument takes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not JSON ({error}): write for example '{example}', in single quotes"
        ) from None


def json_object(text: str, example: str = OPTIONS_EXAMPLE) -> dict[str, Any]:
    """For argparse: a JSON object."""
    found = json_value(text, example)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a JSON object, such as '{example}'")
    return found


def serve_words(text: str) -> list[str]:
    """For argparse: arguments of `vllm serve`, a JSON list of words."""
    found = json_value(text, WORDS_EXAMPLE)
    if not isinstance(found, list) or not all(isinstance(word, str | int | float) for word in found):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a JSON list of words, such as '{WORDS_EXAMPLE}'")
    return [str(word) for word in found]


def llm_arguments(text: str) -> dict[str, Any]:
    """For argparse: arguments of vLLM's, a JSON object; the numbers that we read as well are checked here."""
    found = json_object(text, ARGUMENTS_EXAMPLE)
    for name in ("max_model_len", "block_size", "kv_cache_memory_bytes"):
        value = found.get(name, 1)
        if type(value) is not int or value < 1:
            raise argparse.ArgumentTypeError(f"{name} {shown(json.dumps(value))} must be a whole number above 0")
    return found


def given_options(text: str) -> dict[str, Any]:
    """For argparse: a JSON object of options, with or without the key "sparq" around it; not checked yet."""
    from vllm_sparq.config import NAMESPACE

    given = json_value(text)
    if not isinstance(given, dict):
        raise argparse.ArgumentTypeError(
            f"must be an object of options, got {text[:N_SHOWN]}: write for example '{OPTIONS_EXAMPLE}'"
        )
    found: Any = given[NAMESPACE] if list(given) == [NAMESPACE] else given
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'{shown(text)}: "{NAMESPACE}" must be an object of options, such as {{"compression": 4}}'
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

    A name of `vllm_sparq.models` where no such folder is: its folder, fetched and converted if it is not there yet.

    Raises:
        UsageError: there is no such folder and no model of that name, or no config.json in it that is a JSON object; it
            could not be fetched.
    """
    try:
        folder = Path(model).expanduser()
        if (folder / "config.json").is_file():
            _check_config(folder / "config.json", model)
            return folder.resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, no such user
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--model {shown(str(model))} cannot be looked up ({reason}): give a folder") from None
    if is_folder:
        raise UsageError(
            f"--model {model}: there is no config.json in it; give a folder with config.json, weights and tokenizer"
        )
    if "/" not in str(model):
        from vllm_sparq.models.catalogue import MODELS
        from vllm_sparq.models.folders import get

        if str(model) in MODELS:
            return get(str(model), say=lambda text: print(text, file=sys.stderr))
    if hub_names and str(model).count("/") == 1 and str(model)[0] not in "./~":
        return folder
    remedy = (
        "or a name of the hub (org/name)" if hub_names else "(a model of the hub must be downloaded to a folder first)"
    )
    raise UsageError(
        f"--model {model}: no such folder; give a folder with config.json, weights and tokenizer {remedy}, or a name "
        "that `vllm-sparq models` lists"
    )


def _check_config(path: Path, model: str | Path) -> None:
    try:
        found = json.loads(path.read_bytes())
        reason = "" if isinstance(found, dict) else f"it holds a {type(found).__name__}"
    except (ValueError, RecursionError) as error:  # not text, not JSON, too deep
        reason = str(error)
    if reason:
        raise UsageError(f"--model {model}: its config.json is not a JSON object ({reason}): give the model's own")
