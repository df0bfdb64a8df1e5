"""Whether drafting pays, from what steps with drafts and without have taken: measured, since it depends on everything.

Where attention takes most of a step drafts are nearly free; where weights do, a draft costs what a token costs. What
answers say does not depend on the decision, so it may follow the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

FIRST = 4
"""Steps of each kind that are looked at before the first decision."""

EVERY = 64
"""Steps after which the other kind is looked at again, for one step."""

FORGET = 0.2
"""Weight of the newest step in the mean."""


@dataclass
class Rates:
    """Tokens per second of batches of one size; zero while unknown."""

    drafting: float = 0.0
    plain: float = 0.0
    n_steps: int = 0

    def note(self, rate: float, *, drafting: bool) -> None:
        """What a step has achieved."""
        name = "drafting" if drafting else "plain"
        before: float = getattr(self, name)
        setattr(self, name, rate if before == 0.0 else before + FORGET * (rate - before))

    def wants_drafts(self) -> bool:
        """Whether the next step should bring drafts."""
        self.n_steps += 1
        if self.n_steps <= 2 * FIRST:
            return self.n_steps <= FIRST
        better = self.drafting >= self.plain
        return better if self.n_steps % EVERY else not better


@dataclass
class Pace:
    """Times steps from one call of the proposer to the next.

    Attributes:
        clock: seconds.
    """

    clock: Callable[[], float] = perf_counter
    _rates: dict[int, Rates] = field(default_factory=dict)
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
        rates = self._rates.setdefault(n_requests.bit_length(), Rates())
        if n_requests == self._n_requests and all(n_tokens) and now > self._began:
            rates.note(sum(n_tokens) / (now - self._began), drafting=self._drafted)
        self._began, self._n_requests = now, n_requests
        self._drafted = rates.wants_drafts()
        return self._drafted
