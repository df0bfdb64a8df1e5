"""What drafts gain: how many tokens a step gives, how many drafts are taken, and how to fix that for dummy weights."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Turn:
    """What one engine did in its turn.

    Attributes:
        seconds: of each step.
        n_tokens: that its steps gave all requests.
        per_token: seconds, by turn where several are added up.
        verified: how many drafts a request had brought, and how many of them were taken; of every request and step that
            brought any.
    """

    seconds: list[float] = field(default_factory=list)
    n_tokens: int = 0
    per_token: list[float] = field(default_factory=list)
    verified: list[tuple[int, int]] = field(default_factory=list)

    def add(self, other: Turn, batch: int) -> None:
        """Another turn of the same engine."""
        self.seconds += other.seconds
        self.n_tokens += other.n_tokens
        self.per_token.append(sum(other.seconds) * batch / other.n_tokens)

    def tokens_per_step(self, batch: int) -> float:
        """Of a request; 1 without drafts."""
        return self.n_tokens / (len(self.seconds) * batch)

    def times_per_token(self, batch: int) -> list[float]:
        """Seconds of every step; or of every turn, where steps give more than one token, and not all as many."""
        return self.seconds if self.n_tokens == len(self.seconds) * batch else self.per_token


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """The first and the last tenth of some times; one alone is both."""
    if len(values) < 2:
        return values[0], values[0]
    found = statistics.quantiles(values, n=10)
    return found[0], found[-1]


def acceptance(verified: Sequence[tuple[int, int]]) -> list[float]:
    """By position: the share of drafts that were taken, of those whose predecessors were."""
    longest = max((n for n, _ in verified), default=0)
    shares = []
    for position in range(longest):
        reached = [taken for n, taken in verified if n > position and taken >= position]
        if not reached:
            break
        shares.append(round(sum(taken > position for taken in reached) / len(reached), 4))
    return shares


class ForcedAcceptance:
    """Replaces ``forward`` of vLLM's rejection sampler: a given share of the drafts is what the target would say, too.

    Random weights agree with no draft. All is computed as always; then the target's logits are made to agree with the
    draft, or not to.

    Args:
        sampler: the model runner's.
        share: of drafts, each by itself.
    """

    def __init__(self, sampler: Any, share: float) -> None:
        import torch

        self.forward, self.share = sampler.forward, share
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        import torch

        drafts, rows = metadata.draft_token_ids.long(), metadata.target_logits_indices.long()
        agree = torch.rand(len(drafts), generator=self.generator) < self.share
        far = torch.finfo(logits.dtype).max / 2
        logits[rows, drafts] = torch.where(agree, far, -far).to(logits)
        return self.forward(metadata, draft_probs, logits, sampling_metadata)
