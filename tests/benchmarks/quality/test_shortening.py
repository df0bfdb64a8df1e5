"""Prompts with their most frequent tokens left out."""

from __future__ import annotations

import pytest

from tests.benchmarks.quality.test_cache_bytes import SHAPE
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.evaluate import methods_at
from vllm_sparq.benchmarks.quality.shortening import N_NEWEST, Shortened, shortened_by
from vllm_sparq.console import UsageError


def test_the_rarest_stay_and_the_newest() -> None:
    """70 tokens that matter little, 64 that always stay, and four places: of what occurs once, all of it."""
    old = [1, *[7, 8] * 33, 5, 6, 9, 9]
    newest = list(range(100, 100 + N_NEWEST))
    prompt = [*old, *newest]
    assert len(old) == 71
    method = Shortened(name="", compression=len(prompt) / 69)
    assert method.given(len(prompt)) == 69
    assert method.shortened(prompt) == [1, 5, 6, 9, 9, *newest]
    assert Shortened(name="", compression=len(prompt) / 68).shortened(prompt) == [1, 5, 6, 9, *newest]
    assert Shortened(name="", compression=len(prompt) / 70).shortened(prompt) == [1, 8, 5, 6, 9, 9, *newest]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 66, 700])
def test_a_prompt_keeps_its_share_in_its_order(n: int) -> None:
    prompt = [(i * i) % 40 for i in range(n)]
    found = shortened_by(4).shortened(prompt)
    assert len(found) == shortened_by(4).given(n) == min(n, max(65, -(-n // 4)))
    assert found[0] == prompt[0]
    assert found[-N_NEWEST:] == prompt[-N_NEWEST:]


def test_it_takes_compressions_like_other_methods() -> None:
    found = methods_at(["frequency"], ["4", "8"], {"r": 8})
    assert [(one.name, one.backend, one.options) for one in found[1:]] == [
        ("frequency 1/4", None, {}),
        ("frequency 1/8", None, {}),
    ]
    with pytest.raises(UsageError, match="--compression 1 leaves nothing out of a prompt: give frequency more than 1"):
        methods_at(["frequency"], ["1"], {})


def test_bytes_are_those_of_what_stays() -> None:
    dense = Method.named("dense")
    assert SHAPE.moved(shortened_by(8), 4096) * 8 == SHAPE.moved(dense, 4096)
    assert SHAPE.held(shortened_by(8), 4096) * 8 == SHAPE.held(dense, 4096)
