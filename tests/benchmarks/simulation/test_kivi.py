"""Bits per byte, and the simulation of KIVI that the kivi formats are compared with: the parts that need no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_sparq.benchmarks.quality.bits_per_byte import windows
from vllm_sparq.benchmarks.simulation.kivi import SimulatedCache, rounded
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError


def test_windows_cover_the_text_from_its_start() -> None:
    text = "The key of Anna is 12345. " * 50
    found = [(*one.prompt_ids, *one.answer_ids) for one in windows(WEIGHTS, text, 32, 5)]
    (whole,) = windows(WEIGHTS, text, 160, 1)
    assert [len(window) for window in found] == [32] * 5
    assert [token for window in found for token in window] == [*whole.prompt_ids, *whole.answer_ids]
    assert len(whole.prompt_ids) == 1  # all but the first token are scored
    with pytest.raises(UsageError, match=r"the text has [\d,]+ tokens: 1000 windows of 32 need more"):
        windows(WEIGHTS, text, 32, 1000)


def test_rounding_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 2.4, 3.0], [5.0, 5.0, 5.0, 5.0]])
    torch.testing.assert_close(rounded(x, 2), torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0]]))


def test_simulated_cache_is_exact_where_kivi_is() -> None:
    """The prompt's own step; then K after the last whole residual, and the last residual of V."""
    cache, gen = SimulatedCache(bits=2, group=4, residual=8), torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 1, 21, 8, generator=gen) for _ in range(2))
    first = cache.update(key, value, 0)
    assert first[0].equal(key)
    assert first[1].equal(value)
    one = torch.randn(1, 1, 1, 8, generator=gen)
    keys, values = cache.update(one, one, 0)
    assert keys[:, :, 16:21].equal(key[:, :, 16:])
    assert values[:, :, 14:21].equal(value[:, :, 14:])
    assert not keys[:, :, :16].isclose(key[:, :, :16]).all(2).any()
    assert not values[:, :, :14].isclose(value[:, :, :14]).all(-1).any()
    assert len(keys[0, 0, :4, 3].unique()) <= 4


@pytest.mark.parametrize(
    ("words", "methods"),
    [
        (["kivi", "--bits", "4"], ["dense", "KIVI-4"]),
        (
            ["retention", "--budget", "0.9", "--scores", "sum,decayed"],
            ["dense", "h2o 0.9", "h2o 0.9, decayed", "streaming 0.9"],
        ),
    ],
)
def test_commands_write_a_line_per_method(words: list[str], methods: list[str], tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    asked = ["--tasks", "needle", "--lengths", "150", "--n", "2", "--out", str(out)]
    assert main(["research", *words, *asked]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["method"] for line in lines] == methods
    assert lines[0]["score"] == 100
    assert {"difference_low", "commit", "model", "seed"} <= lines[1].keys()
