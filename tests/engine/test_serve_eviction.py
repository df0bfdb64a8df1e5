"""A real `vllm serve --attention-backend h2o` under pressure, and what it says about it in vLLM's metrics."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from tests.engine.support import MODEL, Prompts
from tests.engine.test_serve import N_CLIENTS, N_TOKENS, crowd, metric
from vllm_sparq.benchmarks.common.server import Server, wait_until_healthy

pytestmark = [pytest.mark.engine, pytest.mark.long]


def test_pressure_and_its_metrics(tmp_path: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 clients on a pool for twelve: nobody fails, nobody is preempted, and the counters say why."""
    options = {"budget": 192, "prefill": "bounded", "pressure": "evict"}
    arguments = [
        *("--attention-backend", "h2o", "--additional-config", json.dumps({"sparq": options})),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
        *("--block-size", "32", "--num-gpu-blocks-override", "40", "--max-num-batched-tokens", "2048"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--seed", "0"),
    ]
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "1")
    with Server("sparq", MODEL, arguments, folder=tmp_path) as server:
        wait_until_healthy([server], timeout_s=240)
        requests = [prompts.of_length(n) for n in (90, 150, 260, 400, 120, 170, 140)]
        _, together = asyncio.run(crowd(server, requests))
        assert [len(answer) for i, answer in enumerate(together) if i % 5 != 4] == [N_TOKENS] * (N_CLIENTS - 12)
        assert metric(server, "vllm:num_preemptions") == 0
        assert metric(server, "vllm:kv_cache_usage_perc") == 0
        for name in ("evicted_tokens", "saved_blocks", "saved_bytes", "preemptions_avoided"):
            assert metric(server, f"vllm:sparq_{name}") > 0, name
        assert metric(server, "vllm:sparq_saved_bytes") == metric(server, "vllm:sparq_saved_blocks") * 32 * 2 * 520 * 4
        assert {layer["backend"] for layer in server.attention_report().values()} == {"H2O"}
        deadline = time.monotonic() + 20
        while "sparq: finished requests did without" not in Path(server.log).read_text():
            assert time.monotonic() < deadline, "no line in the log"
            time.sleep(1)
        assert "prefix caching is off" in Path(server.log).read_text()
