"""Libraries that only some commands need: an extra of this package, asked for by name where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from vllm_sparq.console import UsageError


def optional(module: str, purpose: str) -> Any:
    """A module of the extra ``eval``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{purpose} needs {error.name}: pip install optuna rouge-score") from None
