"""Steps of decodes are one captured graph, which the host feeds nothing and asks nothing; prompts stay out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cuda.pretend.graphs import Graph
from tests.cuda.pretend.traffic import Traffic
from tests.engine.support import EXACT

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", EXACT["sparse"]),
    "quest": ("quest", {"k": 1, "dense_below": 0}),
    "flexgen": ("flexgen", {}),
    "k4v2": ("kivi", {"format": "k4v2"}),
    "h2o": ("h2o", {"budget": 96, "recent": 32}),
    "h2o over kivi4": ("h2o", {"budget": 256, "format": "kivi4", "prefill": "bounded"}),
    "streaming": ("streaming", {"budget": 96}),
    "sparq over h2o": ("sparq", {**EXACT["sparse"], "retention": "heavy_hitter", "budget": 128}),
}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], list[Traffic]]]:
    """How each step ran (FULL, PIECEWISE, NONE), and the traffic of our share of its preparation."""
    from vllm.v1.worker.gpu import model_runner

    from vllm_sparq.attention_backends.steps.builder import PagedMetadataBuilder

    modes: list[str] = []
    traffic: list[Traffic] = []
    dispatch, build = model_runner.dispatch_cg_and_sync_dp, PagedMetadataBuilder.build

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        found = dispatch(*args, **kwargs)
        modes.append(found[0].cg_mode.name)
        return found

    def built(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        step = common_attn_metadata
        with Traffic([step.query_start_loc_cpu, step.seq_lens_cpu_upper_bound, step.is_prefilling]) as counted:
            found = build(self, common_prefix_len, step, fast_build)
        traffic.append(counted)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatched)
        patch.setattr(PagedMetadataBuilder, "build", built)
        yield modes, traffic


@pytest.mark.parametrize("name", BACKENDS)
def test_decodes_are_one_graph_that_the_host_leaves_alone(
    name: str, engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many replays as steps; three requests in a graph for four; answers as without graphs."""
    backend, options = BACKENDS[name]
    some = [prompts.of_length(n) for n in (40, 129, 300)]
    small: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=64 << 20, block_size=64)
    with engine(backend, options, **small) as llm, watched(monkeypatch) as (modes, traffic):
        before = Graph.n_replays
        prompts.answers(llm, some, 1)
        n_prompt_steps, n_prompt_replays = len(modes), Graph.n_replays - before
        answers = prompts.answers(llm, some, 70)
        assert modes[2 * n_prompt_steps :] == ["FULL"] * 69
        assert Graph.n_replays - before == 2 * n_prompt_replays + 69
        counted = traffic[-69:]
        assert [step.reads for step in counted] == [[]] * 69
        assert [step.copies for step in counted] == [[]] * 69
    with engine(backend, options, enforce_eager=True, **small) as llm:
        assert prompts.answers(llm, some, 70) == answers
