"""Lengths worked out on the device are those of `vllm_sparq.retention`, which the block managers go by."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vllm_sparq.attention_backends.steps.arrivals import Phases, arrivals
from vllm_sparq.retention import Phase, Retention

RETENTIONS = [
    Retention(
        budget=budget, recent=recent, sinks=sinks, rank="attention", bounded=bounded, interval=interval, block_size=16
    )
    for budget, recent, sinks, bounded, interval in product((40, 0.3), (None, 7), (0, 4), (False, True), (1, 16))
]
PROMPTS = (1, 2, 39, 40, 41, 64, 255, 256, 257, 600)


@pytest.mark.parametrize("retention", RETENTIONS, ids=str)
def test_as_the_host_counts(retention: Retention) -> None:
    """Every position of answers to prompts around budgets, blocks and segments."""
    cases = [(prompt, prompt + i) for prompt in PROMPTS for i in range(90)]
    prompts, positions = (torch.tensor(column, dtype=torch.int32) for column in zip(*cases, strict=True))
    found = arrivals(positions + 1, prompts, retention)
    assert all(numbers.dtype == torch.int32 for numbers in found)
    for i, (prompt, position) in enumerate(cases):
        known, budget = retention.arrival(position, prompt), retention.budget_of(prompt)
        recent_from = position + 1 - retention.recent_of(budget)
        expected = [position, known.held, known.kept, known.kept + 1, recent_from]
        assert [int(numbers[i]) for numbers in found] == expected, (prompt, position)


@pytest.mark.parametrize("retention", RETENTIONS, ids=str)
def test_with_shrunk_budgets(retention: Retention) -> None:
    """Some of a batch, from any position of the answer on."""
    prompt, budget = 300, retention.least_budget + 16
    cases: list[tuple[int, Phase | None]] = []
    for start in range(prompt + 1, prompt + 40, 7):
        phase = retention.shrunk(retention.answer(prompt), start, budget)
        cases += [(position, phase) for position in range(start, start + 50)]
        cases.append((start, None))
    positions = torch.tensor([position for position, _ in cases])
    shrunk = Phases(torch.device("cpu")).on_device([phase for _, phase in cases])
    found = arrivals(positions + 1, torch.full_like(positions, prompt), retention, shrunk)
    for i, (position, phase) in enumerate(cases):
        known = retention.arrival(position, prompt, phase)
        assert (int(found.held[i]), int(found.kept[i])) == (known.held, known.kept), (position, phase)


def test_padding_takes_no_slot() -> None:
    """A graph for four requests that holds three."""
    found = arrivals(torch.tensor([0, 50]), torch.tensor([0, 20]), RETENTIONS[0])
    assert [int(numbers[0]) for numbers in found] == [0, 0, 0, 0, 0]
    assert int(found.seq_lens[1]) == 40


def test_phases_are_sent_when_they_change() -> None:
    phases, one = Phases(torch.device("cpu")), Phase(start=3, held=2, budget=4)
    assert phases.on_device([None, None]) is None
    sent = phases.on_device([None, one])
    assert sent is not None
    assert sent.tolist() == [[-1, -1, -1], [3, 2, 4]]
    assert phases.on_device([None, one]) is sent
    assert phases.on_device([one, None]) is not sent
