"""Drafts of sampled requests are verified at the request's own temperature, which vLLM's CPU kernels lose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.sample import rejection_sampler

from vllm_sparq.attention_backends.cpu_worker import expanded, expanding


def test_each_draft_has_its_request_s_temperature() -> None:
    logits, n_drafts = torch.randn(6, 5), torch.tensor([2, 0, 1, 3], dtype=torch.int32)
    sampling: Any = SimpleNamespace(
        all_greedy=False, temperature=torch.tensor([0.5, 9.0, 0.0, 2.0]), top_k=None, top_p=None
    )
    constrain = expanding(rejection_sampler.apply_sampling_constraints)
    found = constrain(logits.clone(), n_drafts.cumsum(0).to(torch.int32), sampling)
    each = torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0, 2.0])
    torch.testing.assert_close(found, logits / each[:, None])


def test_a_step_without_a_draft_is_constrained_too() -> None:
    """vLLM's own takes the largest top_k of none, and the engine ends."""
    sampling: Any = SimpleNamespace(
        all_greedy=False, temperature=torch.tensor([0.9]), top_k=torch.tensor([1], dtype=torch.int32), top_p=None
    )
    constrain = expanding(rejection_sampler.apply_sampling_constraints)
    assert constrain(torch.randn(0, 5), torch.tensor([0], dtype=torch.int32), sampling).shape == (0, 5)
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = constrain(logits, torch.tensor([1], dtype=torch.int32), sampling)
    assert found.isfinite().tolist() == [[False, True, False]]


def test_whole_numbers_stay_whole() -> None:
    found = expanded(torch.tensor([7, 0], dtype=torch.int32), torch.tensor([1, 3]), 3)
    assert found.tolist() == [7, 0, 0]
    assert found.dtype == torch.int32
