"""A real `vllm serve` under load: many clients, some of whom leave, on a pool too small for them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.support import EXACT, MODEL, Prompts
from vllm_sparq.benchmarks.common.server import HOST, Server, wait_until_healthy

pytestmark = pytest.mark.engine

N_CLIENTS = 64
N_TOKENS = 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = [
        *("--attention-backend", "sparq", "--additional-config", json.dumps({"sparq": EXACT["sparse"]})),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
        *("--block-size", "32", "--num-gpu-blocks-override", "70", "--max-num-batched-tokens", "2048"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--seed", "0"),
    ]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    folder = tmp_path_factory.mktemp("serve")
    with Server("sparq", MODEL, arguments, folder=folder, environment=environment) as running:
        wait_until_healthy([running], timeout_s=240)
        yield running


async def ask(client: httpx.AsyncClient, prompt: list[int], *, leave_after: int | None = None) -> list[int]:
    """Token ids of a streamed greedy completion; leaves after some tokens if told to."""
    body = dict(
        model="sparq",
        prompt=prompt,
        max_tokens=N_TOKENS,
        temperature=0,
        ignore_eos=True,
        stream=True,
        return_token_ids=True,
    )
    tokens: list[int] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                if leave_after is not None and len(tokens) >= leave_after:
                    return tokens
    return tokens


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"http://{HOST}:{server.port}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + "{", name + "_total{")))


async def crowd(server: Server, requests: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """What each request answers alone, and in the crowd (every fifth client leaves early)."""
    limits = httpx.Limits(max_connections=N_CLIENTS)
    async with httpx.AsyncClient(base_url=f"http://{HOST}:{server.port}", timeout=300, limits=limits) as client:
        alone = [await ask(client, request) for request in requests]
        tasks = [
            ask(client, requests[i % len(requests)], leave_after=5 if i % 5 == 4 else None) for i in range(N_CLIENTS)
        ]
        return alone, list(await asyncio.gather(*tasks))


def test_crowd(server: Server, prompts: Prompts) -> None:
    """Nobody's answer depends on the others, on preemption, or on clients who leave."""
    requests = [prompts.of_length(n) for n in (90, 200, 260, 400, 500, 700, 900)]
    alone, together = asyncio.run(crowd(server, requests))
    assert metric(server, "vllm:num_preemptions") > 0
    for i, answer in enumerate(together):
        expected = alone[i % len(requests)]
        assert len(expected) == N_TOKENS
        assert answer == expected[: len(answer)], f"client {i}"
        assert len(answer) == (N_TOKENS if i % 5 != 4 else len(answer)) >= 5


def test_request_longer_than_the_model(server: Server) -> None:
    """Refused with the numbers, and the server goes on."""
    body: dict[str, Any] = dict(model="sparq", prompt=[5] * 3000, max_tokens=4)
    answer = httpx.post(f"http://{HOST}:{server.port}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "2048" in answer.text
    assert server.is_healthy()


def test_pool_is_returned(server: Server, prompts: Prompts) -> None:
    """When nobody asks any more, no block is in use: of who was answered and of who left."""

    async def two() -> None:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{server.port}", timeout=60) as client:
            await asyncio.gather(
                ask(client, prompts.of_length(300)), ask(client, prompts.of_length(200), leave_after=5)
            )

    before = metric(server, "vllm:generation_tokens")
    asyncio.run(two())
    assert metric(server, "vllm:generation_tokens") > before
    until = time.monotonic() + 10
    while metric(server, "vllm:kv_cache_usage_perc") > 0 and time.monotonic() < until:
        time.sleep(0.1)  # the last step may not have told yet
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_class_in_the_worker(server: Server) -> None:
    report = server.attention_report()
    assert {layer["impl"] for layer in report.values()} == {"PagedImpl"}
    assert Path(server.log).exists()


def complete(server: Server, xargs: dict[str, Any], **body: Any) -> httpx.Response:
    asked = dict(model="sparq", prompt=[5, *range(20, 300)], max_tokens=16, temperature=0, vllm_xargs=xargs, **body)
    return httpx.post(f"http://{HOST}:{server.port}/v1/completions", json=asked, timeout=60)


def test_requests_choose_what_is_read(server: Server) -> None:
    """Each field of `vllm_xargs` arrives, and is counted."""
    before = {name: metric(server, f"vllm:sparq_{name}") for name in ("dense_requests", "tuned_requests")}
    answers = [
        complete(server, xargs).json()["choices"][0]["text"]
        for xargs in ({"sparq": "off"}, {"sparq.compression": 64}, {"sparq.r": 2, "sparq.k": 40, "sparq.min_k": 4})
    ]
    assert len({*answers}) > 1
    for name, n_more in (("dense_requests", 1), ("tuned_requests", 2)):
        assert metric(server, f"vllm:sparq_{name}") - before[name] == n_more


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"sparq.r": 65}, ["sparq.r", "head size 64", "use r <= 64"]),
        ({"sparq.mass": 2}, ["mass=2", "less than 1"]),
        ({"sparq": "dense"}, ["'dense' is neither", "off"]),
        ({"sparq": {"k": 5}}, ["vllm_xargs"]),  # vLLM takes no objects there
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_is_refused_with_the_reason(
    server: Server, xargs: dict[str, Any], words: list[str]
) -> None:
    refused = complete(server, xargs)
    assert refused.status_code == 400
    for word in words:
        assert word in refused.text
    streamed = complete(server, xargs, stream=True)  # vLLM may have begun to answer by then: the reason is in there
    assert streamed.status_code in (200, 400)
    assert words[-1] in streamed.text
    assert server.is_healthy()
