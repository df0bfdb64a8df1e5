"""K that 4 bits per token cannot hold: the measure on made-up K, and biases of a model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_sparq.attention_backends import impl
from vllm_sparq.attention_backends.keys import MOST_MOVED, attention_moved, biased_projections, is_fragile
from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.attention_backends.steps.staged_rows import staged_rows
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import PageLayout

LAYOUT = PageLayout(head_size=64, block_size=128, dtype=torch.bfloat16, format="int4")


SCALE = 1 / 8


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Query [T, H, D] and K [T, G, D] as most models have them."""
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(300, n, 64, generator=generator).bfloat16() for n in (4, 2))
    return query, keys


def test_only_keys_in_four_bits_of_a_token_are_looked_at() -> None:
    assert {name for name in FORMATS if is_fragile(Options(read="dense", format=name))} == {"int4"}


def test_ordinary_keys_fit() -> None:
    assert 0 < attention_moved(*prompt(), LAYOUT, SCALE) < 0.02


@pytest.mark.parametrize("head", [0, 1])
def test_a_constant_channel_spoils_the_others(head: int) -> None:
    """As the biases of some models make it: 60 deviations from zero, which itself moves no attention."""
    query, keys = prompt()
    keys[:, head, 9] += 60
    assert attention_moved(query, keys, LAYOUT, SCALE) > MOST_MOVED


def test_a_large_channel_spoils_the_others() -> None:
    """Its own variance does not hide it, nor do queries that see it as they saw it before."""
    query, keys = prompt()
    keys[:, 1, [9, 41]] *= 60
    query[:, 2:, [9, 41]] /= 60
    assert attention_moved(query, keys, LAYOUT, SCALE) > MOST_MOVED


def test_long_queries_see_what_short_ones_do_not() -> None:
    """The same K: attention that is sharp moves more."""
    query, keys = prompt()
    assert attention_moved(12 * query, keys, LAYOUT, SCALE) > 20 * attention_moved(query, keys, LAYOUT, SCALE)


def test_by_hand() -> None:
    """K is zero but of the first token, where one channel of 15 makes a step 1, and 1/4 in another channel is lost.

    A query of 32 in that other channel sees a logit of 1, and none in the codes: attention becomes uniform.
    """
    keys = torch.zeros(65, 1, 64).bfloat16()
    keys[0, 0, :2] = torch.tensor([15.0, 0.25])
    query = torch.zeros(65, 1, 64).bfloat16()
    query[:, 0, 1] = 8 * 4
    rows = range(32, 65, 8)
    expected = 0.0
    for row in rows:
        exact = torch.tensor([1.0, *[0.0] * row]).log_softmax(0)
        moved = torch.zeros(row + 1).log_softmax(0)
        expected += float((exact.exp() * (exact - moved)).sum()) / len(rows)
    assert attention_moved(query, keys, LAYOUT, SCALE) == pytest.approx(expected, rel=1e-5)


def test_keys_that_are_all_alike_move_nothing() -> None:
    query, keys = prompt()
    assert attention_moved(query, torch.zeros_like(keys), LAYOUT, SCALE) == 0


def test_biases_of_projections_are_counted() -> None:
    class Attention(torch.nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.qkv_proj, self.o_proj = torch.nn.Linear(4, 4, bias=bias), torch.nn.Linear(4, 4)

    assert biased_projections(torch.nn.ModuleList([Attention(True), Attention(False), Attention(True)])) == 2


def test_the_device_is_not_asked_which_prompt_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of short prompts alone ask it nothing, in however many layers; the longest of a step is looked at."""
    spec: Any = SimpleNamespace(block_size=256, staged_per_page=256)
    table = torch.arange(12, dtype=torch.int32).view(3, 4)

    def rows_of(*lens: int) -> PrefillRows:
        starts = [0, *torch.tensor(lens).cumsum(0).tolist()]
        return staged_rows(starts, list(lens), table[: len(lens)], 0, None, spec, Options(format="int4"), 0)[0]

    looked_at: list[int] = []
    monkeypatch.setattr(impl, "attention_moved", lambda query, key, *_: looked_at.append(len(query)) or 0.0)
    layer: Any = object.__new__(impl.PagedImpl)
    layer._source, layer._looks_at_keys, layer.scale = None, True, 1.0
    tokens, pages = torch.zeros(200, 1, 16), SimpleNamespace(layout=None)
    short = replace(rows_of(20, 63, 5), query_start_loc=None)  # type: ignore[arg-type]  # nobody may read it
    layer._look_at_keys(short, tokens, tokens, pages)
    assert layer._looks_at_keys
    assert not looked_at
    layer._look_at_keys(rows_of(20, 100, 5), tokens, tokens, pages)
    assert not layer._looks_at_keys
    assert looked_at == [100]
