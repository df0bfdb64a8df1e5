"""Engines that the benchmarks start in processes of their own, from one that has loaded vLLM already."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import pytest

from tests.engine.support import environment

environment()  # before vLLM is imported

PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


@pytest.fixture(autouse=True)
def _vllm_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it takes eight seconds of CPU, and a dozen of engines are started here.

    A process of a fork server inherits nothing from this one, just as a spawned one: what it is given is pickled.
    Progress bars, which read their variable as they are imported, would keep what the first such process was given;
    vLLM's own commands divide by what theirs count.
    """
    monkeypatch.setenv("TQDM_DISABLE", "")
    get_context = multiprocessing.get_context
    get_context("forkserver").set_forkserver_preload(PRELOADED)  # type: ignore[attr-defined]

    def loaded(method: str | None = None) -> BaseContext:
        return get_context("forkserver" if method == "spawn" else method)

    monkeypatch.setattr(multiprocessing, "get_context", loaded)
