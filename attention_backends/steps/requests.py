"""What the metadata of a step needs to know of its requests and vLLM's metadata does not carry.

Our worker makes one `StepRequests` for its model runner and hands it to the layers it has loaded; the metadata builder
of a layer finds it there. So two engines in one process never ask each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from vllm_sparq.attention_backends.steps.arrivals import on_device
from vllm_sparq.config import Options
from vllm_sparq.retention import Phase

T = TypeVar("T")


class StepRequests:
    """Answers about the requests of a step, from a model runner of either generation.

    Attributes:
        phases: request id -> the budget that the scheduler has shrunk, as of the step that runs.
        policies: request id -> the options of a request that has chosen what is read of it.
        batch: model runner V2: what vLLM makes the metadata of a step of the model from, while it does; else None, so
            for the steps of drafting models.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.phases: Mapping[str, Phase] = {}
        self.policies: dict[str, Options] = {}
        self.batch: Any = None

    def named(self, step: Any) -> Any:
        """The step with its requests, which vLLM names to models without layers that have a state alone.

        Beside such layers it also calls a prompt's last token that comes alone a decode.
        """
        if self.batch is None or step.req_idx is not None:
            return step
        in_prompt = torch.from_numpy(self.batch.is_prefilling_np)
        return replace(step, req_idx=self.batch.idx_mapping_np, is_prefilling=in_prompt)

    def prompt_lens(self, step: Any) -> torch.Tensor | None:
        """Prompt length of each request of a step: int [B], on the CPU, 0 for padding; None where vLLM hides it."""
        runner = self._runner
        if not hasattr(runner, "req_states"):
            known: torch.Tensor = runner.input_batch.num_prompt_tokens_cpu_tensor[: step.num_reqs]
            return known
        rows = _rows(step)
        if rows is None:
            return None
        lens = torch.zeros(step.num_reqs, dtype=torch.int32)
        lens[: len(rows)] = torch.from_numpy(runner.req_states.prompt_len.np)[rows]
        return lens

    def prompt_lens_on(self, step: Any, device: torch.device) -> torch.Tensor:
        """The same on the device, without waiting for it: int [B].

        Raises:
            RuntimeError: vLLM does not say which requests the step brings.
        """
        if self.batch is not None:
            rows = self.batch.idx_mapping
            lens = torch.zeros(step.num_reqs, dtype=torch.int32, device=device)
            lens[: len(rows)] = self._runner.req_states.prompt_len.gpu[rows]
            return lens
        return on_device(self.prompt_lens_of(step), torch.int32, device)

    def prompt_lens_of(self, step: Any) -> torch.Tensor:
        """`prompt_lens`, for those that cannot do without.

        Raises:
            RuntimeError: vLLM does not say which requests the step brings.
        """
        lens = self.prompt_lens(step)
        if lens is None:
            raise RuntimeError(
                "tokens cannot be evicted in a step whose requests vLLM does not name (req_idx is None): start without "
                "--speculative-config, or with retention 'all'"
            )
        return lens

    def shrunk(self, step: Any) -> list[Phase | None]:
        """The shrunk budget of each request of a step, or None."""
        return self._of_requests(step, self.phases)

    def policies_of(self, step: Any) -> list[Options | None]:
        """What each request of a step has chosen, or None for what its engine reads."""
        return self._of_requests(step, self.policies)

    def follow(self, scheduler_output: Any, chosen: Callable[[Any], Options | None]) -> None:
        """Remember what requests that join with a step have chosen, and forget those that have ended.

        Args:
            scheduler_output: what the step brings.
            chosen: options for the sampling parameters of a request, None for the engine's.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.policies.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            options = chosen(new.sampling_params)
            if options is not None:
                self.policies[new.req_id] = options
            elif self.policies:  # a session goes on with parameters of its own
                self.policies.pop(new.req_id, None)

    def _of_requests(self, step: Any, known: Mapping[str, T]) -> list[T | None]:
        """What is known of each request of a step, by its id."""
        found: list[T | None] = [None] * step.num_reqs
        if not known:
            return found
        if hasattr(self._runner, "req_states"):
            rows = _rows(step)
            names = self._runner.req_states.index_to_req_id
            ids = [] if rows is None else [names.get(row) for row in rows.tolist()]
        else:
            ids = self._runner.input_batch.req_ids[: step.num_reqs]
        for i, request_id in enumerate(ids):
            found[i] = known.get(request_id)
        return found


def _rows(step: Any) -> torch.Tensor | None:
    """Model runner V2: the rows of a step's requests in the runner's table, int64 [B]; drafting models name none."""
    if step.req_idx is None:
        return None
    return torch.as_tensor(step.req_idx, device="cpu")[: step.num_reqs].long()
