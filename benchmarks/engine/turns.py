"""The engines that decode in turns, each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.engine_process import IN_TURNS, EngineProcess
from vllm_sparq.benchmarks.common.proof import check_attention
from vllm_sparq.benchmarks.engine.cases import Case, Engine, Model
from vllm_sparq.benchmarks.engine.worker import TurnsWorker


def start(
    stack: contextlib.ExitStack,
    chosen: list[Engine],
    model: Model,
    folder: Path,
    text: Sequence[int] | None,
    room: Case,
    report: Callable[[str], None],
) -> tuple[dict[str, EngineProcess], dict[str, dict[str, Any]]]:
    """Name -> running engine, which ends with ``stack``, and name -> what is recorded of it.

    Raises:
        UsageError: an engine did not start.
        WrongAttentionError: an engine runs another attention than its method's.
    """
    running: dict[str, EngineProcess] = {}
    about: dict[str, dict[str, Any]] = {}
    for engine in chosen:
        report(f"starting the {engine.name} engine")
        make = partial(TurnsWorker, dummy=model.folder is None)
        name = f"the {engine.name} engine"
        process = EngineProcess(name, make, engine, folder, text, room, environment=IN_TURNS)
        running[engine.name] = stack.enter_context(process)
        found = process.ask("describe")
        attention = check_attention(engine.method, found.pop("report"))
        about[engine.name] = {"options": engine.method.options, "attention": attention, **found}
    return running, about
