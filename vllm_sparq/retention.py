"""How many tokens of a request stay, and when some go: pure functions on numbers.

The scheduler's block managers and the workers both compute these, from the position of a token and the length of its
prompt alone. So they agree without a message, whatever the engine does with the request in between.

A token arrives with its *position* in the request. By then some *slots* are taken; if there are too many, tokens are
evicted first, the same number in every KV head, and the token goes into the slot after those that are kept:

    prompt, full       nothing is evicted                                         slots = position
    prompt, bounded    at each multiple of `segment` tokens, down to the budget   slots <= budget + segment
    answer             whenever `budget` slots are taken, `interval` tokens go    slots <= budget

Which tokens go is the workers' business (`vllm_sparq.ops.evict`): it may differ from one KV head to another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SEGMENT = 256
"""Prompt tokens after which ``prefill: bounded`` evicts; rounded up to whole blocks."""


PHASES = "sparq_phases"
"""Attribute of a scheduler's output: request id -> `Phase` of the requests whose budget has been shrunk."""


Rank = Literal["attention", "age"]
"""What decides who goes first: least ``attention`` so far (heavy hitters stay), or ``age`` (a window stays)."""

BY_ATTENTION: frozenset[Rank] = frozenset({"attention"})
"""Ranks for which pages add up the attention that each token gets, by all query heads of a KV head."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of an answer with one budget: from position ``start`` on, when ``held`` slots were taken."""

    start: int
    held: int
    budget: int


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What happens when a token arrives: ``held`` slots are taken; ``kept`` of them stay, and it becomes the next."""

    held: int
    kept: int

    @property
    def n_evicted(self) -> int:
        return self.held - self.kept


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule for which tokens stay.

    Attributes:
        rank: what decides who goes first; see `vllm_sparq.ops.evict`.
        sinks: first tokens that stay unless the user says otherwise.
        recent: newest tokens that stay whatever their rank, the arriving one included; None where the user may choose.
        summary: what stays beside the sinks, for people; ``{recent}`` stands for the newest tokens.
    """

    rank: Rank
    sinks: int
    recent: int | None
    summary: str


RETENTIONS: dict[str, Policy | None] = {
    "all": None,
    "heavy_hitter": Policy(
        rank="attention", sinks=0, recent=None, summary="the {recent} newest and those with the most attention"
    ),
    "window": Policy(rank="age", sinks=4, recent=1, summary="the newest"),
}
"""Value of the option ``retention`` -> its rule. ``heavy_hitter``: H2O (arXiv 2306.14048); ``window``: StreamingLLM
(arXiv 2309.17453), whose four sinks stay."""

EVICTING: dict[str, Policy] = {name: policy for name, policy in RETENTIONS.items() if policy is not None}
"""Those by which tokens go."""


def adds_up_attention(retention: str) -> bool:
    """Whether pages add up attention under this value of the option ``retention``."""
    return retention in EVICTING and EVICTING[retention].rank in BY_ATTENTION


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What stays of the requests of one engine.

    Attributes:
        budget: tokens that a request keeps per KV head, or their share of its prompt.
        recent: newest tokens that always stay, the arriving one included; None for half of the budget.
        sinks: first tokens that always stay.
        rank: what decides who goes first.
        bounded: whether prompts are evicted from while they are read.
        interval: tokens that go at a time: 1, or a block where pages have to be finished (codes, ranking copies).
        block_size: N.
    """

    budget: int | float
    recent: int | None
    sinks: int
    rank: Rank
    bounded: bool
    interval: int
    block_size: int

    @property
    def segment(self) -> int:
        """Prompt tokens between two evictions of ``prefill: bounded``."""
        return -(-SEGMENT // self.block_size) * self.block_size

    @property
    def least_budget(self) -> int:
        """The smallest budget that holds what must stay."""
        return self._whole_blocks((1 if self.recent is None else self.recent) + self.sinks + self.interval)

    def budget_of(self, prompt_len: int) -> int:
        """Tokens that a request with this prompt keeps; whole blocks where a block goes at a time."""
        share = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * prompt_len)
        return max(self._whole_blocks(share), self.least_budget)

    def _whole_blocks(self, n_tokens: int) -> int:
        return n_tokens if self.interval == 1 else -(-n_tokens // self.block_size) * self.block_size

    def recent_of(self, budget: int) -> int:
        """Newest tokens that always stay within this budget, the arriving one included."""
        room = budget - self.interval - self.sinks
        return min(budget // 2 if self.recent is None else self.recent, max(room, 0) + 1)

    def answer(self, prompt_len: int) -> Phase:
        """The phase that begins after the prompt."""
        last = prompt_len - 1
        held = self._of_prompt(last, self.budget_of(prompt_len)).kept + 1 if prompt_len else 0
        return Phase(start=prompt_len, held=held, budget=self.budget_of(prompt_len))

    def shrunk(self, phase: Phase, position: int, budget: int) -> Phase:
        """The phase that begins with ``position`` when the budget becomes ``budget`` there."""
        return Phase(start=position, held=self._of_answer(position, phase).held, budget=budget)

    def arrival(self, position: int, prompt_len: int, phase: Phase | None = None) -> Arrival:
        """What happens when the token at ``position`` arrives; ``phase`` is the answer's where it was shrunk."""
        if position < prompt_len:
            return self._of_prompt(position, self.budget_of(prompt_len))
        return self._of_answer(position, phase or self.answer(prompt_len))

    def _of_prompt(self, position: int, budget: int) -> Arrival:
        if not self.bounded:
            return Arrival(held=position, kept=position)
        start = position - position % self.segment
        kept = min(start, budget) + position - start
        held = kept
        if position == start and start > budget:
            held = min(start - self.segment, budget) + self.segment
        return Arrival(held=held, kept=kept)

    def _of_answer(self, position: int, phase: Phase) -> Arrival:
        budget = phase.budget
        first = phase.held if phase.held < budget else budget - self.interval
        slots = first + position - phase.start
        if position == phase.start:
            return Arrival(held=phase.held, kept=first)
        if slots < budget:
            return Arrival(held=slots, kept=slots)
        since = (slots - budget) % self.interval
        kept = budget - self.interval + since
        return Arrival(held=kept if since else budget, kept=kept)

    def next_cut(self, position: int, prompt_len: int) -> int:
        """First position after ``position`` at which tokens may be evicted: rows before it can be taken together."""
        if position >= prompt_len:
            return position + 1
        if not self.bounded:
            return prompt_len
        return min(prompt_len, position - position % self.segment + self.segment)

    def most_slots(self, n_tokens: int, prompt_len: int, *, answering: bool, phase: Phase | None = None) -> int:
        """Slots that a request needs for its first ``n_tokens``; ``answering`` once its whole prompt has been read."""
        budget = self.budget_of(prompt_len) if phase is None else phase.budget
        of_answer = min(n_tokens, budget)
        if answering:
            return of_answer
        of_prompt = min(n_tokens, prompt_len)
        return max(min(of_prompt, budget + self.segment) if self.bounded else of_prompt, of_answer)
