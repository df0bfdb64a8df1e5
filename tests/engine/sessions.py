"""Resumable requests (vLLM's `StreamingInput`) in an engine of this process: prompts that grow after an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Turns = Sequence[list[int]]
"""Prompt tokens of each turn."""


class Sessions:
    """Sessions that run beside each other in one engine core, a step at a time."""

    def __init__(self, llm: Any) -> None:
        self.core = llm.llm_engine.engine_core.engine_core
        self.vllm_config = llm.llm_engine.vllm_config

    def talk(self, sessions: Mapping[str, Turns], n_tokens: int = 30) -> dict[str, list[list[int]]]:
        """Greedy answers of each session, ``n_tokens`` a turn; its next turn is sent when its last answer is there."""
        waiting: dict[str, Iterator[list[int]]] = {name: iter(turns) for name, turns in sessions.items()}
        answers: dict[str, list[list[int]]] = {name: [] for name in sessions}
        for name in sessions:
            self._next_turn(name, waiting[name], answers[name], n_tokens)
        while any(len(answers[name]) <= len(turns) for name, turns in sessions.items()):
            for name, tokens, ended in self.step():
                answers[name][-1] += tokens
                if ended:
                    self._next_turn(name, waiting[name], answers[name], n_tokens)
        self.step()
        return {name: said[:-1] for name, said in answers.items()}

    def talk_ahead(self, sessions: Mapping[str, Turns], n_tokens: int = 30) -> dict[str, list[list[int]]]:
        """The same where all turns are sent at once: each begins in the step in which the answer before it ends."""
        answers: dict[str, list[list[int]]] = {name: [[]] for name in sessions}
        for name, turns in sessions.items():
            for prompt in turns:
                self.send(name, prompt, n_tokens)
            self.send(name, [0], n_tokens, resumable=False)
        while any(len(answers[name]) <= len(turns) for name, turns in sessions.items()):
            for name, tokens, ended in self.step():
                answers[name][-1] += tokens
                if ended:
                    answers[name].append([])
        return {name: said[:-1] for name, said in answers.items()}

    def _next_turn(self, name: str, turns: Iterator[list[int]], said: list[list[int]], n_tokens: int) -> None:
        """Send the next turn, or say that there is none; either way a new answer begins."""
        prompt = next(turns, None)
        self.send(name, prompt if prompt is not None else [0], n_tokens, resumable=prompt is not None)
        said.append([])

    def send(self, name: str, prompt: list[int], n_tokens: int, *, resumable: bool = True) -> None:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        params = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
        params.update_from_generation_config({}, 2)
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            resumable=resumable,
        )
        self.core.add_request(*self.core.preprocess_add_request(request))

    def step(self) -> list[tuple[str, list[int], bool]]:
        """Of each request that got tokens: its name, the tokens, and whether its turn has ended."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            found, _ = self.core.step_fn()
        outputs = [output for of_client in (found or {}).values() for output in of_client.outputs]
        return [(out.request_id, list(out.new_token_ids), out.finish_reason is not None) for out in outputs]
