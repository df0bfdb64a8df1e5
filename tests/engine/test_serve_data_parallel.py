"""`vllm serve --data-parallel-size 2`: two engines, two API servers, and metrics that count everything once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.engine.support import MODEL, Prompts
from tests.engine.test_serve import N_CLIENTS, N_TOKENS, crowd, metric
from vllm_sparq.benchmarks.common.server import Server, wait_until_healthy

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_metrics_of_two_api_servers(tmp_path: Path, prompts: Prompts) -> None:
    """What requests did without is known from their lengths; what the schedulers counted must be there, too."""
    options = {"budget": 192, "prefill": "bounded", "pressure": "evict"}
    arguments = [
        *("--attention-backend", "h2o", "--additional-config", json.dumps({"sparq": options})),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--data-parallel-size", "2"),
        *("--block-size", "32", "--num-gpu-blocks-override", "20", "--max-num-batched-tokens", "2048"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--seed", "0"),
    ]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with Server("sparq", MODEL, arguments, folder=tmp_path, environment=environment) as server:
        wait_until_healthy([server], timeout_s=300)
        assert Path(server.log).read_text().count("Application startup complete") == 2
        requests = [prompts.of_length(n) for n in (90, 150, 260, 400, 120, 170, 140)]
        _, together = asyncio.run(crowd(server, requests))
        assert [len(answer) for i, answer in enumerate(together) if i % 5 != 4] == [N_TOKENS] * (N_CLIENTS - 12)
        for name in ("evicted_tokens", "saved_blocks", "saved_bytes", "blocks_taken", "preemptions_avoided"):
            assert metric(server, f"vllm:sparq_{name}") > 0, name
