"""As many drafts are made as pay, by the clock; a clock of the test's own."""

from __future__ import annotations

import pytest

from vllm_sparq.attention_backends.pace import EVERY, FIRST, Pace

PLAIN = {0: (1.0, 1)}


class Engine:
    """Steps of two requests: number of drafts -> the seconds that a step takes, and the tokens that a request gets."""

    def __init__(self, steps: dict[int, tuple[float, int]]) -> None:
        self.now, self.steps, self.n_tokens = 0.0, steps, 0
        self.tokens = [1, 1]
        self.pace = Pace(max(steps), lambda: self.now)

    def run(self, n_steps: int) -> list[int]:
        decisions = []
        for _ in range(n_steps):
            n = self.pace.n_drafts(self.tokens)
            decisions.append(n)
            seconds, n_tokens = self.steps[n]
            self.now += seconds
            self.tokens = [n_tokens] * 2
            self.n_tokens += n_tokens
        return decisions


@pytest.mark.parametrize(
    ("drafting", "best"),
    [
        ({1: (1.0, 2), 2: (2.0, 3)}, 1),
        ({1: (1.5, 2), 2: (1.5, 3)}, 2),
        ({1: (2.5, 2), 2: (4.0, 3)}, 0),
        ({1: (1.0, 2), 2: (1.2, 3), 4: (1.8, 5), 6: (4.0, 6)}, 4),
    ],
)
def test_the_fastest_way_is_taken(drafting: dict[int, tuple[float, int]], best: int) -> None:
    """Three tokens in twice the time of one pay, in four times do not; others are looked at once in a while."""
    decisions = Engine(drafting | PLAIN).run(20 * EVERY)
    assert {*decisions} == {*drafting, 0}
    assert len(decisions[EVERY:]) - decisions[EVERY:].count(best) == 19
    engine = Engine(drafting | PLAIN)
    engine.run(40 * EVERY)
    assert engine.now < engine.n_tokens * min(seconds / n for seconds, n in engine.steps.values()) * 1.03


def test_what_pays_may_change() -> None:
    engine = Engine({1: (4.0, 2)} | PLAIN)
    engine.run(5 * EVERY)
    engine.steps[1] = (1.5, 2)  # longer contexts: attention takes most of a step
    assert engine.run(20 * EVERY)[-EVERY:].count(1) >= EVERY - 2


def test_steps_with_prompts_are_not_timed() -> None:
    """A step in which a prompt was read is slow whatever is drafted."""
    engine = Engine({1: (1.5, 2)} | PLAIN)
    engine.run(3 * EVERY)
    before = engine.pace._kinds[2].steps[1].rate
    engine.now += 1000.0
    engine.pace.n_drafts([1, 0])
    engine.now += 1000.0
    engine.pace.n_drafts([1, 1, 1])
    assert engine.pace._kinds[2].steps[1].rate == before


def test_pauses_are_no_steps() -> None:
    """Clients that come and go leave the engine waiting, always after the same kind of step."""
    engine = Engine({1: (1.8, 2)} | PLAIN)
    engine.run(2)
    engine.now += 100.0
    engine.run(2 * FIRST)
    decisions = []
    for _ in range(20):
        engine.now += 100.0
        decisions += engine.run(8)
    assert decisions.count(0) <= len(decisions) // EVERY + 1


def test_steps_may_become_long_at_once() -> None:
    """Other requests of the same number, with other contexts."""
    engine = Engine({1: (1.5, 2)} | PLAIN)
    engine.run(4 * EVERY)
    engine.steps = {1: (32.0, 2), 0: (4.0, 1)}
    assert engine.run(3 * EVERY)[-EVERY:].count(1) <= 1


def test_drafts_may_be_asked_for_whether_they_pay_or_not() -> None:
    engine = Engine({1: (9.0, 2), 2: (9.0, 2), 3: (9.0, 2)} | PLAIN)
    engine.run(2 * EVERY)
    engine.pace.always = True
    assert engine.run(5) == [3] * 5
