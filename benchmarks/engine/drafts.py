"""What drafts gain: how many tokens a step gives, how many drafts are taken, and how to fix that for dummy weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Turn:
    """What one engine did in its turn.

    Attributes:
        seconds: of each step.
        n_tokens: that its steps gave all requests.
        verified: how many drafts a request had brought, and how many of them were taken; of every request and step that
            brought any.
    """

    seconds: list[float] = field(default_factory=list)
    n_tokens: int = 0
    verified: list[tuple[int, int]] = field(default_factory=list)

    def add(self, other: Turn) -> None:
        """Another turn of the same engine."""
        self.seconds += other.seconds
        self.n_tokens += other.n_tokens

    def tokens_per_step(self, batch: int) -> float:
        """Of a request; 1 without drafts."""
        return self.n_tokens / (len(self.seconds) * batch)


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
