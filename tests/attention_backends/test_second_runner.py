"""What model runner V2 is told, and tells us, of the requests of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.attention_backends.test_builder import build_for, step, table_of_requests
from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.attention_backends.worker import SparqWorkerMixin


class Batch(NamedTuple):
    """As much of vLLM's `BatchReqState` as says which graph runs."""

    has_prefill: bool
    decode_graph_eligible: bool


def followed(batch: Batch | None) -> Any:
    """A runner that our worker follows, and that gathers this batch of one token each."""
    model_state = SimpleNamespace(prepare_attn=lambda input_batch: None)
    runner = SimpleNamespace(gather_batch_req_state=lambda: (batch, 1), model_state=model_state)
    worker = SparqWorkerMixin()
    worker._requests = StepRequests(runner)
    worker._follow_second_runner(runner)
    return runner


@pytest.mark.parametrize("eligible", [True, False])
def test_no_graph_for_a_prompt(eligible: bool) -> None:
    """vLLM has one for a prompt's last token alone; a drafting head asks the batch which graph is its own."""
    batch, n_uniform = followed(Batch(True, eligible)).gather_batch_req_state()
    assert (batch.decode_graph_eligible, n_uniform) == (False, None)


@pytest.mark.parametrize("batch", [Batch(False, True), None])
def test_graphs_for_decodes(batch: Batch | None) -> None:
    """And for steps that vLLM makes up."""
    assert followed(batch).gather_batch_req_state() == (batch, 1)


def unnamed(*requests: tuple[int, int, int]) -> CommonAttentionMetadata:
    """(New tokens, context length, prompt length) requests beside layers with a state, none of them in its prompt."""
    told = vars(step(*requests))
    told |= dict(is_prefilling=torch.zeros(len(requests), dtype=torch.bool), max_seq_len=1000)
    told |= dict(slot_mapping=torch.zeros(told["num_actual_tokens"]))
    del told["prompt_lens"]
    return CommonAttentionMetadata(**told)


def test_steps_beside_layers_with_a_state_have_requests() -> None:
    """A prompt's last token alone is no decode, and an answer that is computed again is read as it was."""
    runner = followed(None)
    runner.req_states = table_of_requests([140, 7, 129]).req_states
    requests = StepRequests(runner)
    batch = SimpleNamespace(
        idx_mapping_np=np.array([2, 0]), idx_mapping=torch.tensor([2, 0]), is_prefilling_np=np.array([True, True])
    )
    runner.req_states.prompt_len.gpu = torch.from_numpy(runner.req_states.prompt_len.np)
    common = unnamed((1, 129, 129), (20, 150, 140))
    lens_on_device = []

    def prepare_attn(input_batch: Any) -> Any:
        lens_on_device.extend(requests.prompt_lens_on(common, torch.device("cpu")).tolist())
        return build_for(requests, common)

    worker = SparqWorkerMixin()
    worker._requests, runner.model_state.prepare_attn = requests, prepare_attn
    worker._follow_second_runner(runner)
    built = runner.model_state.prepare_attn(batch)
    assert (built.n_decodes, lens_on_device) == (0, [129, 140])
    assert built.replayed.seq_lens.tolist() == [*range(141, 151)]
    later = build_for(requests, common)  # as of a drafting model
    assert (later.n_decodes, later.replayed) == (1, None)
