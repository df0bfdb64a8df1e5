"""How far a method's next-token distribution is from dense's: KL divergence at each token of a forced answer.

Bits per byte say how likely the right tokens stay; the divergence says how much anything changes, and so tells methods
apart of which both lose nothing on average. Of dense's distribution the `N_LIKELIEST` likeliest tokens are kept, and
the rest as one: what is measured is the divergence of these sums. It is below that of the whole vocabulary by what the
unlikely tokens change among themselves, and never above it. Kept whole, a text would take a gigabyte.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_sparq.benchmarks.tasks.generated import Example

N_LIKELIEST = 1024
"""Tokens of dense's distribution that are kept one by one."""

LEAST = 1e-12
"""Probability that the rest has at least: it may round to nothing."""


def distribution_file(example: Example) -> str:
    """Name of the file with dense's distributions at the tokens of an answer, in a folder of one model and dtype."""
    tokens = json.dumps([example.prompt_ids, example.prompt, example.answer_ids])
    return hashlib.sha256(tokens.encode()).hexdigest()[:24] + ".npz"


@dataclass
class Recording:
    """What is kept of the distributions of one request, written when the last one has come.

    Attributes:
        n_tokens: how many will come.
        to: the file.
        dense: dense's file, to be compared with; None where these are dense's.
    """

    n_tokens: int
    to: str
    dense: str | None = None
    rows: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept: dict[str, np.ndarray] | None = None
        if self.dense is not None:
            with np.load(self.dense) as opened:
                self.kept = dict(opened)

    def add(self, i: int, logits: torch.Tensor) -> bool:
        """The logits [vocabulary] before token ``i``; True once all are there and the file is written."""
        if self.kept is None:
            self.rows[i] = tuple(part.numpy(force=True) for part in likeliest(logits))
        else:
            ids, logs = (torch.from_numpy(self.kept[name][i]) for name in ("ids", "logs"))
            kl, changed = divergence(logits.cpu(), ids, logs)
            self.rows[i] = np.float64(kl), np.bool_(changed)
        if len(self.rows) < self.n_tokens:
            return False
        columns = [np.stack(column) for column in zip(*(self.rows[i] for i in range(self.n_tokens)), strict=True)]
        names = ("ids", "logs") if self.kept is None else ("divergence", "changed")
        unfinished = Path(self.to).with_suffix(".unfinished.npz")
        found: Any = dict(zip(names, columns, strict=True))
        np.savez(unfinished, **found)
        unfinished.rename(self.to)
        return True


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ids of the likeliest tokens of logits [vocabulary], the likeliest first, and their fp32 log-probability."""
    logs, ids = torch.log_softmax(logits.float(), -1).topk(min(N_LIKELIEST, logits.shape[0]))
    return ids.int(), logs


def divergence(logits: torch.Tensor, ids: torch.Tensor, logs: torch.Tensor) -> tuple[float, bool]:
    """KL divergence, in nats, of the distribution of logits [vocabulary] from dense's, and whether its top changed.

    Args:
        logits: a method's.
        ids: dense's likeliest tokens, the likeliest first.
        logs: their log-probabilities.
    """
    mine = torch.log_softmax(logits.double(), -1)
    theirs, of_these = logs.double(), mine[ids.long()]
    rest_theirs, rest_mine = ((1 - part.exp().sum()).clamp(min=LEAST) for part in (theirs, of_these))
    kl = (theirs.exp() * (theirs - of_these)).sum()
    if len(ids) < logits.shape[0]:
        kl = kl + rest_theirs * (rest_theirs / rest_mine).log()
    return max(0.0, float(kl)), int(logits.argmax()) != int(ids[0])


def read_divergence(file: Path) -> tuple[tuple[float, ...], int]:
    """The divergence at each token, and how many tops changed, of a file of a `Recording`."""
    with np.load(file) as opened:
        return tuple(map(float, opened["divergence"])), int(opened["changed"].sum())
