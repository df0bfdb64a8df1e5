"""How many tokens to draft, from what steps with few drafts, many and none have taken: it depends on everything.

A draft costs what a token costs; verifying one more costs little where attention waits for memory, and as much as
another request where it computes. What answers say does not depend on the decision, so it may follow the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter

FIRST = 4
"""Steps of each number of drafts before the first decision."""

EVERY = 64
"""Steps after which another number than the best is tried again, for one step."""

REMEMBERED = 5
"""Newest steps of each number that count."""


@dataclass
class Steps:
    """The newest steps of one number of drafts, with the tokens that each gave."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    n_tokens: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def rate(self) -> float:
        """Tokens per second, zero while unknown. The median leaves out steps that nobody asked for at once."""
        return mean(self.n_tokens) / median(self.seconds) if self.seconds else 0.0

    def note(self, seconds: float, n_tokens: int) -> None:
        """One more."""
        self.seconds.append(seconds)
        self.n_tokens.append(n_tokens)


@dataclass
class Kinds:
    """Steps of batches of one size.

    Attributes:
        numbers: of drafts that are tried, the largest first.
        steps: number -> its steps.
    """

    numbers: tuple[int, ...]
    steps: dict[int, Steps] = field(init=False)
    n_steps: int = 0

    def __post_init__(self) -> None:
        self.steps = {n: Steps() for n in self.numbers}

    def n_drafts(self) -> int:
        """How many the next step should bring."""
        i, self.n_steps = self.n_steps, self.n_steps + 1
        if i < FIRST * len(self.numbers):
            return self.numbers[i // FIRST]
        best = max(self.numbers, key=lambda n: self.steps[n].rate)
        if self.n_steps % EVERY:
            return best
        others = [n for n in self.numbers if n != best]
        return others[self.n_steps // EVERY % len(others)]


@dataclass
class Pace:
    """Times steps from one call of the proposer to the next.

    Attributes:
        most: drafts.
        clock: seconds.
        always: draft as many in every step, paying or not: for those who measure what becomes of drafts.
    """

    most: int
    clock: Callable[[], float] = perf_counter
    always: bool = False
    _kinds: dict[int, Kinds] = field(default_factory=dict)  # by the number of bits of the batch's size
    _began: float = 0.0  # when the last proposal began, how many requests it was for, and how much it drafted
    _n_requests: int = 0
    _n_drafts: int = 0

    def n_drafts(self, n_tokens: list[int]) -> int:
        """How many tokens to draft now.

        Args:
            n_tokens: tokens that the step which has just ended gave each request; 0 where its prompt goes on. A step
                with prompts in it says nothing of drafts: other requests than before, or some without a token.
        """
        now, n_requests = self.clock(), len(n_tokens)
        kinds = self._kinds.setdefault(n_requests.bit_length(), Kinds(self._numbers))
        if n_requests == self._n_requests and all(n_tokens) and now > self._began:
            kinds.steps[self._n_drafts].note(now - self._began, sum(n_tokens))
        self._began, self._n_requests = now, n_requests
        self._n_drafts = self.most if self.always else kinds.n_drafts()
        return self._n_drafts

    @property
    def _numbers(self) -> tuple[int, ...]:
        """As many as there may be, powers of two below, and none."""
        return (self.most, *(1 << i for i in reversed(range((self.most - 1).bit_length()))), 0)
