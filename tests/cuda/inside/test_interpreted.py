"""Our Triton kernels in the engine, interpreted: captured, replayed and padded, they answer as the C++ ones do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.pretend.graphs import Graph
from tests.engine.support import Prompts, rarely

SPARSE = {"r": 8, "k": 24, "dense_below": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", SPARSE),
    "sparq with the mean value": ("sparq", {**SPARSE, "mean_value": "on"}),
    "sparq by probabilities": ("sparq", {**SPARSE, "group_reduce": "probs"}),
    "sparq with a mass": ("sparq", {**SPARSE, "mass": 0.7, "min_k": 4}),
    "sparq over int4": ("sparq", {**SPARSE, "format": "int4"}),
    "sparq over kivi4": ("sparq", {**SPARSE, "format": "kivi4"}),
    "quest": ("quest", {"k": 16, "dense_below": 0, "dense_layers": 0}),
    "flexgen": ("flexgen", {}),
    "kivi": ("kivi", {}),
    "h2o": ("h2o", {"budget": 64, "recent": 16}),
    "h2o over int4": ("h2o", {"budget": 128, "format": "int4"}),
    "streaming": ("streaming", {"budget": 64}),
}


RARELY = ("sparq with the mean value", "sparq by probabilities", "sparq over int4", "kivi")
"""Their kernels' own branches are told apart by tests/ops, their formats and captures by the other methods here."""


@pytest.mark.parametrize("name", rarely(METHODS, *RARELY))
def test_answers_are_those_of_the_cpu_kernels(
    name: str, tiny: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, options = METHODS[name]
    rng = random.Random(2)
    some = [[rng.randrange(3, 256) for _ in range(n)] for n in (30, 65, 110)]
    small: dict[str, Any] = dict(model=str(tiny), skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4)
    small |= dict(kv_cache_memory_bytes=8 << 20, block_size=32, compilation_config={"mode": 0, "custom_ops": ["none"]})
    small["compilation_config"]["cudagraph_capture_sizes"] = [4]
    found = {}
    for implementation in ("cpu", "triton"):
        monkeypatch.setenv("VLLM_SPARQ_IMPL", implementation)
        before = Graph.n_replays
        with engine(backend, options, **small) as llm:
            found[implementation] = Prompts.answers(llm, some, 6)
        assert Graph.n_replays - before >= 5
    assert found["triton"] == found["cpu"]
