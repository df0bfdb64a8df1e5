"""Real vLLM engines on the bundled model, in this process, one at a time."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine.support import ENGINE, EXACT, MODEL, Prompts, environment

environment()  # before vLLM is imported


@contextmanager
def collecting_once() -> Iterator[None]:
    """One garbage collection at the end instead of one wherever vLLM asks.

    It asks nine times in the life of an engine, each time over all that vLLM, transformers and torch have loaded: four
    of the six seconds of a small engine. `running_engine` keeps that out of the way (`gc.freeze`), but vLLM takes it
    back when an engine ends (`gc.unfreeze`).
    """
    collect = gc.collect
    gc.collect = lambda *_: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.unfreeze()
        gc.collect()


@contextmanager
def running_engine(backend: str, options: dict[str, Any] | None = None, **engine_args: Any) -> Iterator[Any]:
    """An in-process `LLM`, closed on leaving."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()
    llm = LLM(
        **{**ENGINE, **engine_args},
        attention_backend=backend,
        additional_config={"sparq": options or {}},
    )
    try:
        yield llm
    finally:
        with collecting_once():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """``with engine("sparq", options, **engine_args) as llm``."""
    return running_engine


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """Token prompts that end in a task of the bundled model, so that greedy answers are not all alike."""
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(MODEL), random.Random(7))


@pytest.fixture(scope="session")
def sparse_alone(prompts: Prompts) -> dict[int, list[int]]:
    """What each prompt of `prompts.mixed` answers when it is alone in the engine, read sparsely: the yardstick."""
    with running_engine("sparq", EXACT["sparse"]) as llm:
        return {i: prompts.answers(llm, [prompt])[0] for i, prompt in enumerate(prompts.mixed)}
