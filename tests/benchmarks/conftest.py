"""Engines that the benchmarks start in processes of their own, from one that has loaded vLLM already."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import pytest

from tests import preloaded
from tests.engine.support import environment

environment()  # before vLLM is imported


@pytest.fixture(autouse=True)
def _vllm_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen of engines are started here."""
    for name, value in preloaded.SETTLED.items():
        monkeypatch.setenv(name, value)
    get_context = multiprocessing.get_context

    def loaded(method: str | None = None) -> BaseContext:
        return preloaded.context() if method == "spawn" else get_context(method)

    monkeypatch.setattr(multiprocessing, "get_context", loaded)
