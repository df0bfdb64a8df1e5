"""Teacher forcing through the engine: what probability a method gives to each token of a text, as it is served.

Two ways, both with vLLM's own log-probabilities of the untouched logits:

* *from the prompt*: the text is a prompt, and vLLM returns the log-probability of each of its tokens. One pass, but
  right only where a row of a prompt reads what a decode step would read.
* *step by step*: the text's beginning is the prompt and the rest is decoded, with `ForcedTokens` allowing one token at
  each step. Right for every method, since every token is read as a served one is. Many texts go in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.divergence import Recording

FORCED = "sparq_forced_tokens"
"""Key in `SamplingParams.extra_args`: the tokens that a request has to say."""

RECORDED = "sparq_recording"
"""Another: what to keep of the distribution at each of them, the arguments of `Recording`."""


class ForcedTokens(LogitsProcessor):
    """Leaves each request that asks for it one token to say. Others are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, tuple[Sequence[int], list[int], Recording | None]] = {}
        self.recordings: dict[str, Recording] = {}  # by their files: a preempted request goes on with its own

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keep, for each row of the batch, the tokens to say and the growing list of those said."""
        process_dict_updates(self.requests, batch_update, self._request)

    def _request(
        self, params: Any, prompt: list[int] | None, said: list[int]
    ) -> tuple[Sequence[int], list[int], Recording | None] | None:
        given = params.extra_args or {}
        tokens = given.get(FORCED)
        if tokens is None:
            return None
        recording = None
        if RECORDED in given:
            asked = given[RECORDED]
            recording = self.recordings.setdefault(asked["to"], Recording(n_tokens=len(tokens), **asked))
        return tokens, said, recording

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, vocabulary], in place."""
        for row, (tokens, said, recording) in self.requests.items():
            if len(said) < len(tokens):
                if recording is not None and recording.add(len(said), logits[row]):
                    del self.recordings[recording.to]
                keep = logits[row, tokens[len(said)]].clone()
                logits[row] = -torch.inf
                logits[row, tokens[len(said)]] = keep
        return logits


def prompts_measure(method: Method) -> bool:
    """Whether a row of a prompt reads what a decode step of the method reads, so that one pass measures it.

    A quantized format does, as long as a prompt sees the blocks of its own chunk as codes; reading few tokens, or
    keeping few, acts on decode steps and is not seen in a prompt.
    """
    if method.backend is None:
        return True
    options = method.parsed
    keeps_all = options.retention == "all"
    return not method.read.dials and keeps_all and options.chunk == "codes"
