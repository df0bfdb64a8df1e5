"""Real vLLM engines on the bundled model, in this process, one at a time."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

from tests.engine.poison import poisoned
from tests.engine.support import ENGINE, EXACT, MODEL, Prompts, environment

environment()  # before vLLM is imported


@contextmanager
def leaving_garbage() -> Iterator[None]:
    """Garbage is neither collected, nor frozen, nor unfrozen.

    vLLM collects it nine times in the life of an engine, each time over all that has been loaded: most of what a small
    engine takes.
    """
    names = ("collect", "freeze", "unfreeze")
    before = {name: getattr(gc, name) for name in names}
    for name in names:
        setattr(gc, name, lambda *_: 0)
    try:
        yield
    finally:
        for name in names:
            setattr(gc, name, before[name])


def rebinding_once() -> None:
    """vLLM looks for its Triton kernels in all that is loaded, to put C++ ones in their place. Once will do.

    The modules that define them have them then, and who imports these later finds them. It is half of a small engine's
    start.
    """
    from vllm.triton_utils import dispatcher

    rebind = dispatcher._rebind_kernels

    def first(overrides: list[Any]) -> None:
        rebind(overrides)
        dispatcher._rebind_kernels = lambda _: None

    dispatcher._rebind_kernels = first


def counting_ranks_as_written() -> None:
    """vLLM compiles how it counts the ranks of log-probabilities: four seconds of a process, twelve at first."""
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)


rebinding_once()
counting_ranks_as_written()


@contextmanager
def running_engine(
    backend: str, options: dict[str, Any] | None = None, *, poison: bool = True, **engine_args: Any
) -> Iterator[Any]:
    """An in-process `LLM`, closed on leaving. Whatever a test asks it, blocks that nobody owns are NaN (``poison``)."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()  # what there is already is not walked when the engine's garbage is collected
    with leaving_garbage():
        llm = LLM(
            **{**ENGINE, **engine_args},
            attention_backend=backend,
            additional_config={"sparq": options or {}},
        )
    try:
        with poisoned(llm) if poison else nullcontext():
            yield llm
    finally:
        with leaving_garbage():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """``with engine("sparq", options, **engine_args) as llm``."""
    return running_engine


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """That of the bundled model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> Prompts:
    """Token prompts that end in a task of the bundled model, so that greedy answers are not all alike.

    Each file draws its own: what it asks must not depend on the files that ran before it in this process.
    """
    return Prompts(tokenizer)


@pytest.fixture(scope="session")
def sparse_alone(tokenizer: Any) -> dict[int, list[int]]:
    """What each prompt of `prompts.mixed` answers when it is alone in the engine, read sparsely: the yardstick."""
    prompts = Prompts(tokenizer)
    with running_engine("sparq", EXACT["sparse"]) as llm:
        return dict(enumerate(prompts.alone(llm, prompts.mixed)))
