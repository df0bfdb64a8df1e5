"""K that 4 bits per token cannot hold: the measure on made-up K, and biases of a model."""

from __future__ import annotations

import pytest
import torch

from vllm_sparq.attention_backends.keys import MOST_NOISE, biased_projections, is_fragile, noise_of_codes
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import PageLayout

LAYOUT = PageLayout(head_size=64, block_size=128, dtype=torch.bfloat16, format="int4")


def keys() -> torch.Tensor:
    """K [T, G, D] as most models have it."""
    return torch.randn(300, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_only_keys_in_four_bits_of_a_token_are_looked_at() -> None:
    assert {name for name in FORMATS if is_fragile(Options(read="dense", format=name))} == {"int4"}


def test_ordinary_keys_fit() -> None:
    assert noise_of_codes(keys(), LAYOUT) < 0.05


@pytest.mark.parametrize("head", [0, 1])
def test_a_constant_channel_spoils_the_others(head: int) -> None:
    """As the biases of some models make it: 60 deviations from zero."""
    x = keys()
    x[:, head, 9] += 60
    assert noise_of_codes(x, LAYOUT) > MOST_NOISE


def test_a_large_channel_spoils_the_others() -> None:
    """Its own variance does not hide it."""
    x = keys()
    x[:, 1, [9, 41]] *= 60
    assert noise_of_codes(x, LAYOUT) > MOST_NOISE


def test_channels_that_never_change_have_no_say() -> None:
    x = keys()
    x[:, :, 8:] = 0
    assert noise_of_codes(x, LAYOUT) < 0.05
    assert noise_of_codes(torch.zeros(300, 2, 64).bfloat16(), LAYOUT) == 0


def test_biases_of_projections_are_counted() -> None:
    class Attention(torch.nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.qkv_proj, self.o_proj = torch.nn.Linear(4, 4, bias=bias), torch.nn.Linear(4, 4)

    assert biased_projections(torch.nn.ModuleList([Attention(True), Attention(False), Attention(True)])) == 2
