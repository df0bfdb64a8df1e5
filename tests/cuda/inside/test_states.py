"""Beside layers with a state vLLM names no requests, and takes a prompt's last token alone for a decode."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import seeded
from tests.cuda.inside.test_prompts import first_logprobs
from tests.engine.support import Prompts, rarely
from tests.engine.test_states import CONV, arguments, counted, growing, too_small

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", {"r": 4, "k": 10, "local": 2, "dense_below": 0}),
    "flexgen": ("flexgen", {}),
    "h2o": ("h2o", {"budget": 96, "recent": 32}),
    "streaming": ("streaming", {"budget": 96}),
}

FEW: dict[str, Any] = dict(max_num_seqs=6, max_num_batched_tokens=128)
"""vLLM needs a block of states for each request that may run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seeded.register()
    return CONV.write(tmp_path_factory.mktemp("conv"))


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 512) for _ in range(n)] for n in lengths]


def test_a_last_token_that_comes_alone(folder: Path, engine: Any) -> None:
    """Prompts in chunks of which the last has one token are read in full; of convolutions chunks change the bits."""
    some, found = random_prompts(129, 257, 385), []
    for options in (METHODS["sparq"][1], {"compression": 1, "k": 4096, "dense_below": 0}):
        with engine("sparq", options, **arguments(folder, **FEW)) as llm:
            found.append([first_logprobs(llm, prompt) for prompt in some])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", rarely(METHODS, "flexgen", "streaming"))
def test_same_answers(name: str, folder: Path, engine: Any) -> None:
    """Together, and on a pool that is too small, as alone."""
    some = random_prompts(5, 129, 300, 513)
    with engine(*METHODS[name], **arguments(folder, **FEW)) as llm:
        alone = Prompts.alone(llm, some)
        more, small = growing(llm), too_small(llm)
        alone += Prompts.alone(llm, more)
    with engine(*METHODS[name], **arguments(folder, **FEW, **small)) as llm:
        assert Prompts.answers(llm, [*some, *more]) == alone
        assert counted(llm, "num_preemptions") > 0 or name in ("h2o", "streaming")  # which grow no further
