"""The worker of `benchmarks/gpu/gpu_engine.py`, on default settings: graphs, memory that vLLM measures, steps ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.pretend.graphs import Graph
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import check_attention
from vllm_sparq.benchmarks.engine.cases import Case
from vllm_sparq.benchmarks.gpu.engine_worker import GpuEngineWorker

GRAPHS = {"mode": 0, "custom_ops": ["none"], "cudagraph_capture_sizes": [1, 4]}


@pytest.mark.long
def test_it_starts_reads_and_decodes(tiny: Path) -> None:
    method = Method.named("sparq")
    more = {
        "compilation_config": GRAPHS,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 16 << 20,
    }
    worker = GpuEngineWorker(method.engine_args, tiny, graphs=True, max_model_len=256, more=more)
    found = worker.describe()
    assert check_attention(method, found.pop("report"))
    assert found["kv_capacity_tokens"] >= 256
    assert found["start_s"] > 0
    assert worker.prefill_s(200) > 0
    for batch in (3, 1):
        worker.prepare(Case(context=60, batch=batch))
        running = worker.core.scheduler.running
        assert len({tuple(request.prompt_token_ids) for request in running}) == batch
        before = Graph.n_replays
        times = worker.step_ms(3)
        assert len(times) == 3
        assert min(times) > 0
        assert Graph.n_replays > before
