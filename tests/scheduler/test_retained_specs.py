"""Specs of layers that evict: what vLLM plans with, and when blocks return beside layers of another kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from tests.scheduler.test_retaining import (
    BLOCKS,
    BOUNDED,
    WINDOW,
    EvictingLoop,
    N,
    new_manager,
    short_segments,
    spec_of,
)
from vllm_sparq.retention import Retention
from vllm_sparq.scheduler.manager import RetainingManager
from vllm_sparq.scheduler.spec import RetainedSpec, know_each_other

__all__ = ["short_segments"]


def config_for(max_len: int) -> Any:
    parallel = SimpleNamespace(decode_context_parallel_size=1)
    return SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_len), parallel_config=parallel)


def test_memory_of_a_request_follows_the_budget() -> None:
    """Start-up check and maximum concurrency come from this figure."""
    bounded = spec_of(BOUNDED)
    assert bounded.max_memory_usage_bytes(config_for(8192)) == (64 + 32) // N * bounded.page_size_bytes
    assert spec_of(WINDOW).max_memory_usage_bytes(config_for(8192)) == 512 * spec_of(WINDOW).page_size_bytes


def test_beside_other_layers_blocks_return_a_step_later() -> None:
    """Whose memory it is: a window layer may write into a block before a layer of ours has evicted from it."""
    alone = spec_of(Retention(budget=32, recent=None, sinks=0, rank="age", bounded=False, interval=1, block_size=N))
    window = SlidingWindowSpec(block_size=N, num_kv_heads=1, head_size=16, dtype=torch.float32, sliding_window=32)
    assert know_each_other({"0": alone, "1": alone})["0"] == alone
    beside = know_each_other({"0": alone, "1": window})["0"]
    for spec, n_held in ((alone, (2, 2)), (beside, (5, 2))):
        manager = new_manager(spec)
        sampling = SamplingParams(max_tokens=50, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        request = Request("r", [1] * 70, sampling, None)
        assert manager.allocate_slots(request, 70) is not None
        request.num_computed_tokens = 70
        for held in n_held:
            request.append_output_token_ids(1)
            assert manager.allocate_slots(request, 1) is not None
            assert len(manager.get_block_ids("r")[0]) == held
            request.num_computed_tokens += 1
    with pytest.raises(ValueError, match="use pressure 'preempt'"):
        EvictingLoop(new_manager(beside))


def test_specs_are_known_and_merge() -> None:
    spec = spec_of(BLOCKS, "int8")
    assert isinstance(spec, RetainedSpec)
    assert not spec.prefix_cacheable
    assert KVCacheSpecRegistry.get_manager_class(spec) is RetainingManager
    assert type(spec).merge([spec, spec]) == spec
    with pytest.raises(AssertionError, match="store and keep tokens alike"):
        type(spec).merge([spec, spec_of(WINDOW, "int8")])
