"""Whether drafting pays, from what steps with drafts and without have taken: measured, since it depends on everything.

Where attention takes most of a step drafts are nearly free; where weights do, a draft costs what a token costs. What
answers say does not depend on the decision, so it may follow the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from time import perf_counter

FIRST = 4
"""Steps of each kind that are looked at before the first decision."""

EVERY = 64
"""Steps after which the other kind is looked at again, for one step."""

REMEMBERED = 8
"""Newest steps of a kind that count."""


@dataclass
class Steps:
    """The newest steps of one kind, with the tokens that each gave."""

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
    """Steps of batches of one size."""

    drafting: Steps = field(default_factory=Steps)
    plain: Steps = field(default_factory=Steps)
    n_steps: int = 0

    def wants_drafts(self) -> bool:
        """Whether the next step should bring drafts."""
        self.n_steps += 1
        if self.n_steps <= 2 * FIRST:
            return self.n_steps <= FIRST
        better = self.drafting.rate >= self.plain.rate
        return better if self.n_steps % EVERY else not better


@dataclass
class Pace:
    """Times steps from one call of the proposer to the next.

    Attributes:
        clock: seconds.
        always: draft in every step, paying or not: for those who measure what becomes of drafts.
    """

    clock: Callable[[], float] = perf_counter
    always: bool = False
    _kinds: dict[int, Kinds] = field(default_factory=dict)  # by the number of bits of the batch's size
    _began: float = 0.0  # when the last proposal began, and how many requests it was for
    _n_requests: int = 0
    _drafted: bool = False

    def wants_drafts(self, n_tokens: list[int]) -> bool:
        """Whether to draft now.

        Args:
            n_tokens: tokens that the step which has just ended gave each request; 0 where its prompt goes on. A step
                with prompts in it says nothing of drafts: other requests than before, or some without a token.
        """
        now, n_requests = self.clock(), len(n_tokens)
        kinds = self._kinds.setdefault(n_requests.bit_length(), Kinds())
        if n_requests == self._n_requests and all(n_tokens) and now > self._began:
            kind = kinds.drafting if self._drafted else kinds.plain
            kind.note(now - self._began, sum(n_tokens))
        self._began, self._n_requests = now, n_requests
        self._drafted = kinds.wants_drafts() or self.always
        return self._drafted
