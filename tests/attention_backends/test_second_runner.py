"""What model runner V2 is told, and tells us, of the requests of a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.attention_backends.worker import SparqWorkerMixin


class Batch(NamedTuple):
    """As much of vLLM's `BatchReqState` as says which graph runs."""

    has_prefill: bool
    decode_graph_eligible: bool


def followed(batch: Batch | None) -> Any:
    """A runner that our worker follows, and that gathers this batch of one token each."""
    runner = SimpleNamespace(
        gather_batch_req_state=lambda: (batch, 1), prepare_attn=lambda batch: None, prepare_dummy_attn=lambda: None
    )
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
