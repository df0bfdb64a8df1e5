"""Drafts are made where they pay, by the clock; a clock of the test's own."""

from __future__ import annotations

import pytest

from vllm_sparq.attention_backends.pace import EVERY, FIRST, Pace


class Engine:
    """Steps of two requests that take so many seconds with drafts and without, and give so many tokens a request."""

    def __init__(self, drafting: tuple[float, int], plain: float) -> None:
        self.now, self.drafting, self.plain, self.n_tokens = 0.0, drafting, plain, 0
        self.tokens = [1, 1]
        self.pace = Pace(lambda: self.now)

    def run(self, n_steps: int) -> list[bool]:
        decisions = []
        for _ in range(n_steps):
            drafts = self.pace.wants_drafts(self.tokens)
            decisions.append(drafts)
            self.now += self.drafting[0] if drafts else self.plain
            self.tokens = [self.drafting[1] if drafts else 1] * 2
            self.n_tokens += self.tokens[0]
        return decisions


@pytest.mark.parametrize(("drafting", "pays"), [((2.0, 3), True), ((4.0, 3), False)])
def test_the_faster_way_is_taken(drafting: tuple[float, int], pays: bool) -> None:
    """Three tokens in twice the time of one pay, in four times do not; the other way is looked at once in a while."""
    decisions = Engine(drafting, 1.0).run(10 * EVERY)[2 * FIRST :]
    assert decisions.count(not pays) == 10
    engine = Engine(drafting, 1.0)
    engine.run(20 * EVERY)
    best = min(1.0, drafting[0] / drafting[1])
    assert engine.now < engine.n_tokens * best * 1.03


def test_what_pays_may_change() -> None:
    engine = Engine((4.0, 3), 1.0)
    engine.run(5 * EVERY)
    engine.drafting = (1.5, 3)  # longer contexts: attention takes most of a step
    assert sum(engine.run(20 * EVERY)[-EVERY:]) >= EVERY - 2


def test_steps_with_prompts_are_not_timed() -> None:
    """A step in which a prompt was read is slow whatever is drafted."""
    engine = Engine((2.0, 3), 1.0)
    engine.run(3 * EVERY)
    before = engine.pace._kinds[2].drafting.rate
    engine.now += 1000.0
    engine.pace.wants_drafts([1, 0])
    engine.now += 1000.0
    engine.pace.wants_drafts([1, 1, 1])
    assert engine.pace._kinds[2].drafting.rate == before


def test_pauses_are_no_steps() -> None:
    """Clients that come and go leave the engine waiting, always after the same kind of step."""
    engine = Engine((2.4, 3), 1.0)
    engine.run(2)
    engine.now += 100.0
    engine.run(2 * FIRST)
    decisions = []
    for _ in range(20):
        engine.now += 100.0
        decisions += engine.run(8)
    assert decisions.count(False) <= len(decisions) // EVERY + 1


def test_steps_may_become_long_at_once() -> None:
    """Other requests of the same number, with other contexts."""
    engine = Engine((2.0, 3), 1.0)
    engine.run(4 * EVERY)
    engine.drafting, engine.plain = (64.0, 3), 4.0
    assert engine.run(3 * EVERY)[-EVERY:].count(True) <= 1
