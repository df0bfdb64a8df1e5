"""The same question the other way: a shorter prompt instead of a smaller cache, read by vLLM's own attention.

Prompt compression leaves tokens out before the model sees them. LLMLingua and its successors ask a language model which
ones; this is the baseline that needs none: the tokens that occur most often in the prompt go first, since they say
least. It is a row to compare with, not a method of this project.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.console import UsageError

FREQUENCY = "frequency"
"""Its name on a command line."""

N_NEWEST = 64
"""Tokens at a prompt's end that always stay, because the question is there."""


@dataclass(frozen=True, kw_only=True)
class Shortened(Method):
    """vLLM's own attention, over prompts of which a part is left out.

    Attributes:
        compression: of n tokens n / compression stay.
    """

    compression: float = 1.0

    def given(self, n_tokens: int) -> int:
        return min(n_tokens, max(math.ceil(n_tokens / self.compression), N_NEWEST + 1))

    def shortened(self, prompt: Sequence[int]) -> list[int]:
        """Token ids that stay, in order: the first, the newest, and the rarest; of equally rare ones the newest."""
        n, counts = len(prompt), Counter(prompt)
        always = {0, *range(max(0, n - N_NEWEST), n)}
        ranked = sorted(set(range(n)) - always, key=lambda i: (counts[prompt[i]], -i))
        chosen = always | set(ranked[: max(0, self.given(n) - len(always))])
        return [prompt[i] for i in sorted(chosen)]


def shortened_by(compression: float) -> Shortened:
    """The method at a compression.

    Raises:
        UsageError: it leaves nothing out.
    """
    if compression <= 1:
        raise UsageError(f"--compression {compression:g} leaves nothing out of a prompt: give {FREQUENCY} more than 1")
    return Shortened(name=FREQUENCY, compression=compression)
