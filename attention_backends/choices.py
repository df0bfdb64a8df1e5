"""A choice for each request: how much is read for it, within what the pages of its engine carry.

`SamplingParams.extra_args` says it, which over HTTP is the field ``vllm_xargs``. vLLM takes no objects in there, so
options have names with a dot:

    {"sparq": "off"}                        this request is read densely
    {"sparq.compression": 4}                as under an engine with "compression": 4; so r, k, min_k and mass
    {"sparq": {"r": 16, "k": 256}}          the same from Python, in one

The front end refuses what cannot be used, when the request arrives (`admission`); the scheduler asks which of a
request's tokens are as a prompt would have written them; and workers read its rows so (`.steps.policies`). All of them
make the same options of it here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from vllm.platforms import current_platform

from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.config import NAMESPACE, Options, OptionsError, parse_options
from vllm_sparq.reads import HeadShape

OFF = "off"
"""The choice of a request that is read densely."""

TURNED = ("compression", "r", "k", "min_k", "mass")
"""Options that a request may set: how much is read, never what pages hold."""

REMEDY = (
    f'a request may set {", ".join(f"{NAMESPACE}.{name}" for name in TURNED)}, or "{NAMESPACE}": "{OFF}" to be read '
    "densely; all else is the engine's (--additional-config)"
)


def asked_for(extra_args: Mapping[str, Any] | None) -> str | None:
    """What a request asks for, as text that compares and hashes; None where it leaves all to its engine.

    Raises:
        OptionsError: neither ``"off"`` nor options, or both.
    """
    if not extra_args:
        return None
    whole, dot = extra_args.get(NAMESPACE), f"{NAMESPACE}."
    options = {name.removeprefix(dot): value for name, value in extra_args.items() if str(name).startswith(dot)}
    if whole == OFF and options:
        raise OptionsError(f'"{NAMESPACE}": "{OFF}" and {", ".join(options)} contradict each other: leave one out')
    if whole == OFF:
        return json.dumps(OFF)
    if isinstance(whole, Mapping):
        options = {**{str(name): value for name, value in whole.items()}, **options}
    elif whole is not None:
        raise OptionsError(f'"{NAMESPACE}": {whole!r} is neither "{OFF}" nor an object of options: {REMEDY}')
    return json.dumps(options, sort_keys=True, default=repr) if options else None


@functools.lru_cache(maxsize=1024)
def chosen(engine: PagedEngine, heads: HeadShape, asked: str | None) -> Options | None:
    """The options of a request that asked for this; None where its engine's hold.

    Raises:
        OptionsError: it cannot have it; with value, rule and remedy.
    """
    if asked is None:
        return None
    given = json.loads(asked)
    if given == OFF and (not engine.reads_sparsely or engine.options.lossless):
        return None  # it is answered so already
    if engine.options.lossless:
        raise OptionsError(
            f"{_named(given)}: with lossless every request gets the answers of dense attention: leave it out"
        )
    if not engine.reads_sparsely:
        raise OptionsError(
            f"{_named(given)}: this engine reads densely (read={engine.options.read!r}), and its pages hold nothing "
            "that ranks tokens: ask one that was started with --attention-backend sparq, quest or infllm"
        )
    if current_platform.is_cuda():
        raise OptionsError(
            f"{_named(given)}: a choice for each request is a preview, on CPU alone so far: on CUDA start an engine "
            "with --additional-config for each"
        )
    if given == OFF:
        return engine.options.model_copy(update={"read": "dense"})
    return _turned(engine, heads, given)


def _turned(engine: PagedEngine, heads: HeadShape, given: dict[str, Any]) -> Options | None:
    """The engine's options with those of a request over them."""
    others = [name for name in given if name not in TURNED]
    if others:
        raise OptionsError(f"{_named({name: given[name] for name in others})}: {REMEDY}")
    options = engine.options.model_dump()
    if "compression" in given:  # which r and k of the engine would override
        options |= {"r": None, "k": None}
    try:
        found = parse_options({NAMESPACE: options | given}, engine.backend)
        found.read_of(heads)
    except ValueError as error:
        raise OptionsError(f"{_named(given)}: {str(error).rstrip('.')}. Here {REMEDY}") from None
    return None if found == engine.options else found


def _named(given: Any) -> str:
    """What a request asked for, as it may have written it."""
    if not isinstance(given, dict):
        return f'"{NAMESPACE}": {json.dumps(given)}'
    return ", ".join(f'"{NAMESPACE}.{name}": {json.dumps(value)}' for name, value in given.items())
