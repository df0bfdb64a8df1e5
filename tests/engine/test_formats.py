"""Quantized blocks in real engines: a request answers the same however it is run, and the pool holds what it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.support import EXACT, MODEL, Prompts, assert_preemption_does_not_matter, rarely
from tests.engine.test_capacity import capacity_of

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "flexgen": ("flexgen", {}),
    "kivi2": ("kivi", {"format": "kivi2", "group_size": 16}),
    "sparq over int8": ("sparq", {**EXACT["sparse"], "format": "int8", "group_reduce": "probs"}),
    "sparq over kivi4": ("kivi", {**EXACT["sparse"], "read": "sparq"}),
    "spans over int4": ("flexgen", EXACT["sparse spans"]),
    "k8v4": ("flexgen", {"format": "k8v4"}),
    "sparq over k4v2": ("kivi", {**EXACT["sparse"], "read": "sparq", "format": "k4v2"}),
    "spans over kivi2": ("quest", {**EXACT["sparse spans"], "format": "kivi2", "dense_layers": 0}),
}
RUNS: dict[str, dict[str, Any]] = {
    "chunks of 64": dict(max_num_batched_tokens=64, max_num_seqs=8),
    "prefix caching": dict(enable_prefix_caching=True, max_num_batched_tokens=256),
}


@pytest.fixture(scope="module")
def some(prompts: Prompts) -> list[list[int]]:
    """Prompts that end in the first, second, third ... block, and at its very end."""
    return [prompts.mixed[i] for i in (1, 3, 5, 6, 9)]


def value(llm: Any, name: str) -> float:
    return float(next(m.value for m in llm.get_metrics() if m.name == name))


@pytest.mark.parametrize("method", METHODS)
def test_same_answers(method: str, engine: Any, some: list[list[int]]) -> None:
    """Alone, in a batch, in chunks of any size, from cached blocks: one answer."""
    backend, options = METHODS[method]
    with engine(backend, options) as llm:
        alone = Prompts.alone(llm, some)
        assert Prompts.answers(llm, some) == alone, "in one batch"
    for run, settings in RUNS.items():
        with engine(backend, options, **settings) as llm:
            assert Prompts.answers(llm, some) == alone, run
            if run == "prefix caching":
                assert Prompts.answers(llm, some) == alone, "from cached blocks"


@pytest.mark.long
@pytest.mark.parametrize("method", ["flexgen", "sparq over k4v2"])
def test_compiled(method: str, engine: Any, some: list[list[int]]) -> None:
    backend, options = METHODS[method]
    with engine(backend, options) as llm:
        eager = Prompts.answers(llm, some)
    with engine(backend, options, enforce_eager=False) as llm:
        assert Prompts.answers(llm, some) == eager


def test_quantization_shows(engine: Any, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bits change some answers of this model: the codes are really what is read, of V that is really rotated."""
    found = {}
    exact = {"format": "kivi2", "group_size": 16, "chunk": "exact"}
    coded = {"kivi2": ("kivi", exact), "k4v2": ("kivi", {"format": "k4v2"})}
    for name, (backend, options) in {"dense": ("CPU_ATTN", {}), **coded}.items():
        with engine(backend, options) as llm:
            found[name] = prompts.answers(llm, prompts.mixed)
    short = [i for i, prompt in enumerate(prompts.mixed) if len(prompt) + 24 <= 128]
    assert len(short) >= 2
    for name in coded:
        assert found[name] != found["dense"]
        assert [found[name][i] for i in short] == [found["dense"][i] for i in short], "one unfinished block is exact"
    first = {name: [answer[0] for answer in answers] for name, answers in found.items()}
    assert first["kivi2"] == first["dense"], "a prompt of one chunk sees its tokens exactly"
    assert first["k4v2"] != first["dense"], "or else they would show nothing"
    for turn in ("rotated", "turned_back"):
        monkeypatch.setattr(f"vllm_sparq.attention_backends.impl.{turn}", torch.clone)
    with engine(*coded["k4v2"]) as llm:
        assert prompts.answers(llm, prompts.mixed) != found["k4v2"]


def test_prefix_cache_is_hit(engine: Any, prompts: Prompts) -> None:
    """As many hits as dense attention gets on the same requests."""
    hits = {}
    for backend, options in (("kivi", {}), ("CPU_ATTN", None)):
        with engine(backend, options, block_size=128, enable_prefix_caching=True, disable_log_stats=False) as llm:
            prompts.answers(llm, prompts.mixed)
            prompts.answers(llm, prompts.mixed)
            hits[backend] = value(llm, "vllm:prefix_cache_hits")
    assert hits["kivi"] == hits["CPU_ATTN"] > 1000


@pytest.mark.parametrize("method", rarely(METHODS, "flexgen", "k8v4", "sparq over k4v2", "spans over kivi2"))
def test_preemption(method: str, engine: Any) -> None:
    """A pool that cannot hold all requests: those thrown out come back with the K and V that they had."""
    assert_preemption_does_not_matter(engine, *METHODS[method])


@pytest.mark.long
def test_tensor_parallel(prompts: Prompts, engine: Any) -> None:
    chosen = [prompts.mixed[i] for i in (0, 4, 6, 9)]
    backend, options = METHODS["sparq over int8"]
    with engine(backend, options) as llm:
        one = prompts.answers(llm, chosen)
    with engine(backend, options, tensor_parallel_size=2) as llm:
        assert prompts.answers(llm, chosen) == one
        reports = llm.collective_rpc("attention_report")
    assert len(reports) == 2
    assert {layer["backend"] for report in reports for layer in report.values()} == {"SPARQ"}


def test_capacity() -> None:
    """Tokens in the same memory, by numbers that `tests.engine.test_capacity` finds in running engines."""
    promised = {"int8": 1.9, "k8v4": 2.4, "int4": 3.5, "kivi4": 3.1, "k4v2": 4.1, "kivi2": 5.0}

    def n_blocks(backend: str, options: dict[str, Any]) -> int:
        return int(capacity_of(MODEL, backend, options, 64 << 20, block_size=128).n_blocks)

    dense = n_blocks("CPU_ATTN", {})
    for name, ratio in promised.items():
        assert n_blocks("sparq", {"format": name, "read": "dense"}) >= ratio * dense, name


def test_a_default_block_size_that_backends_may_change_is_not_refused(
    engine: Any, some: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 hold no group of KIVI's; where vLLM asks backends later, that is its default until then."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def with_blocks_of_16(cls: type, vllm_config: Any) -> None:
        check(cls, vllm_config)
        if not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = 16

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_blocks_of_16))
    with engine("kivi", {}) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == 128
        Prompts.answers(llm, some[:1])
