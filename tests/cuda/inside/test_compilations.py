"""Nothing is left to compile when requests come: a trace of mixed steps launches what start-up has launched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.pretend.graphs import Graph
from tests.ops.keys import keys

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", {"r": 8, "dense_below": 512, "mean_value": "on"}),
    "sparq over kivi4": ("sparq", {"r": 8, "dense_below": 0, "format": "kivi4", "dense_layers": 1}),
    "quest": ("quest", {"dense_below": 0, "dense_layers": 0}),
    "h2o over int4": ("h2o", {"budget": 512, "format": "int4"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_step_compiles_a_kernel(name: str, tiny: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 of which only launches are noted: of batches, chunks, prompts' last tokens, eviction, preemption."""
    from vllm_sparq.attention_backends.impl import PagedImpl

    forward = PagedImpl.forward

    def nothing_computed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return forward(self, *args, **kwargs).zero_()

    monkeypatch.setattr(PagedImpl, "forward", nothing_computed)
    monkeypatch.setenv("VLLM_SPARQ_IMPL", "triton")
    backend, options = METHODS[name]
    small: dict[str, Any] = dict(model=str(tiny), skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=9)
    small |= dict(kv_cache_memory_bytes=12 << 20, block_size=32, max_num_batched_tokens=600)
    with keys() as found, engine(backend, options, **small) as llm:
        warm = set(found)
        assert warm
        found.clear()
        before = Graph.n_replays
        run(llm, random.Random(4))
        assert Graph.n_replays > before
        assert len(found) > 100
        assert not {kernel for kernel, _ in set(found) - warm}


def run(llm: Any, rng: random.Random) -> None:
    """Requests of all lengths, coming a few at a time, more than the cache holds."""
    from vllm import SamplingParams

    core = llm.llm_engine
    waiting = [rng.choice([1, 5, 33, 64, 129, 700, 1500, 3000]) for _ in range(14)]
    n_added = 0
    while waiting or core.has_unfinished_requests():
        for _ in range(rng.randrange(3) if waiting else 0):
            if waiting:
                ids = [rng.randrange(3, 250) for _ in range(waiting.pop())]
                params = SamplingParams(
                    temperature=0, max_tokens=rng.randrange(2, 16), ignore_eos=True, detokenize=False
                )
                core.add_request(str(n_added), {"prompt_token_ids": ids}, params)
                n_added += 1
        core.step()
