"""Proposers of drafts for engines of this process; vLLM's own n-grams load what it stumbles over at its next start."""

from __future__ import annotations

from typing import Any, ClassVar


class Echo:
    """Drafts what came after the last token when it was there before: often right where a prompt repeats itself."""

    def __init__(self, vllm_config: Any) -> None:
        self.n_drafts = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, *_: Any, **__: Any) -> None:
        """There is none."""

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        return [
            self.drafts(token_ids_cpu[i, : num_tokens_no_spec[i]].tolist()) if sampled else []
            for i, sampled in enumerate(sampled_token_ids)
        ]

    def drafts(self, tokens: list[int]) -> list[int]:
        """After the tokens of a request."""
        before = [i for i, token in enumerate(tokens[:-1]) if token == tokens[-1]]
        return tokens[before[-1] + 1 :][: self.n_drafts] if before else []


class Scripted(Echo):
    """Drafts what requests will say, as far as it is known, and goes wrong after 0, 1, 2 ... tokens, in turns.

    Attributes:
        known: prompts with their answers.
        n_right: how many drafts were right, each time.
    """

    known: ClassVar[list[list[int]]] = []
    n_right: ClassVar[list[int]] = []

    def drafts(self, tokens: list[int]) -> list[int]:
        rest = next((known[len(tokens) :] for known in self.known if known[: len(tokens)] == tokens), [])
        n_right = min(len(self.n_right) % (self.n_drafts + 1), len(rest))
        if not rest:
            return []
        self.n_right.append(n_right)
        return rest[:n_right] + [(token + 1) % 1000 for token in rest[n_right : self.n_drafts]]


def drafting(name: str, n_drafts: int) -> dict[str, Any]:
    """vLLM's ``speculative_config`` for one of these."""
    return {"method": "custom_class", "model": f"{__name__}.{name}", "num_speculative_tokens": n_drafts}
