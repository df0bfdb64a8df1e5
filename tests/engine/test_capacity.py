"""What a cache holds, by vLLM's own numbers: the same from a configuration alone as from a running engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

FULL, WINDOW = "full_attention", "sliding_attention"
MODELS = {"plain": [FULL] * 4, "1:1": [WINDOW, FULL] * 2, "5:1": [WINDOW] * 5 + [FULL], "full first": [FULL, WINDOW]}
MEMORY = 48 << 20
ARGUMENTS: dict[str, Any] = dict(
    dtype="bfloat16", max_model_len=2048, max_num_batched_tokens=2048, skip_tokenizer_init=True, load_format="dummy"
)
DENSE = "CPU_ATTN", {}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("flexgen", {"format": "int8"}),
    "int4": ("flexgen", {}),
    "kivi4": ("kivi", {}),
    "sparq over int4": ("sparq", {"format": "int4"}),
    "quest over int4": ("quest", {"format": "int4"}),
    "h2o over int4": ("h2o", {"format": "int4"}),
    "k8v4": ("flexgen", {"format": "k8v4"}),
    "k4v2": ("kivi", {"format": "k4v2"}),
    "kivi2": ("kivi", {"format": "kivi2"}),
    "sparq over int8": ("sparq", {"format": "int8"}),
    "sparq over kivi2": ("sparq", {"format": "kivi2"}),
    "quest over kivi2": ("quest", {"format": "kivi2"}),
    "h2o over kivi2": ("h2o", {"format": "kivi2"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations of small models of each kind; no weights."""
    found = {}
    for name, kinds in MODELS.items():
        found[name] = tmp_path_factory.mktemp("model")
        config = dict(
            architectures=["Gemma3ForCausalLM"],
            model_type="gemma3_text",
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=len(kinds),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            query_pre_attn_scalar=64,
            vocab_size=512,
            max_position_embeddings=2048,
            sliding_window=512,
            layer_types=kinds,
        )
        (found[name] / "config.json").write_text(json.dumps(config))
    return found


def capacity_of(folder: Path, backend: str, options: dict[str, Any], memory_bytes: int = MEMORY, **more: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sparq.attention_backends.capacity import capacity

    arguments = {**ARGUMENTS, **more}
    config = EngineArgs(
        model=str(folder), attention_backend=backend, additional_config={"sparq": options}, **arguments
    ).create_engine_config()
    return capacity(config, memory_bytes)


@pytest.fixture(scope="module")
def known(folders: dict[str, Path]) -> Callable[..., Any]:
    """The same of a model by name; each is computed once."""
    found: dict[tuple[str, str, str], Any] = {}

    def of(model: str, backend: str, options: dict[str, Any]) -> Any:
        key = model, backend, json.dumps(options)
        if key not in found:
            found[key] = capacity_of(folders[model], backend, options)
        return found[key]

    return of


RUNNING = [("plain", DENSE), ("1:1", DENSE), *((model, METHODS["int4"]) for model in MODELS), ("5:1", METHODS["kivi4"])]
RUNNING += [("1:1", METHODS["kivi2"]), ("5:1", METHODS["kivi2"])]
RUNNING += [("1:1", METHODS["h2o over int4"]), ("1:1", ("sparq", {})), ("full first", METHODS["h2o over int4"])]


@pytest.mark.parametrize(("model", "method"), RUNNING, ids=lambda value: value if isinstance(value, str) else value[0])
def test_the_numbers_are_a_running_engine_s(
    model: str, method: tuple[str, dict[str, Any]], folders: dict[str, Path], known: Callable[..., Any], engine: Any
) -> None:
    backend, options = method
    found = known(model, backend, options)
    with engine(backend, options, model=str(folders[model]), kv_cache_memory_bytes=MEMORY, **ARGUMENTS) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert found.max_concurrency == cache.kv_cache_max_concurrency
        assert found.n_tokens == cache.kv_cache_size_tokens
        assert found.n_blocks == cache.num_gpu_blocks


def full_bytes(found: Any, *, ours: bool = True) -> float:
    """Bytes of a request in one full-attention layer."""
    groups = [group for group in found.groups if group.ours == ours and group.kind != "SlidingWindowSpec"]
    return sum(group.bytes_per_request for group in groups) / sum(group.n_layers for group in groups)


@pytest.mark.parametrize("model", ["1:1", "5:1"])
@pytest.mark.parametrize("name", METHODS)
def test_sliding_windows_take_a_tenth_of_what_a_format_saves_at_most(
    name: str, model: str, known: Callable[..., Any]
) -> None:
    """And the model as a whole holds more requests than dense, for every format."""
    backend, options = METHODS[name]
    alone = known("plain", backend, options)
    mixed = known(model, backend, options)
    assert full_bytes(mixed) <= full_bytes(alone) / 0.9
    assert mixed.max_concurrency > known(model, *DENSE).max_concurrency


def test_how_many_requests_a_mixed_model_holds(known: Callable[..., Any]) -> None:
    """Of 2,048 tokens in 48 MiB, where blocks of one length for all layers give 10.4 (int4, kivi4) and 10.7."""
    found = {name: known("1:1", *METHODS[name]).max_concurrency for name in METHODS}
    assert known("1:1", *DENSE).max_concurrency == pytest.approx(11.64, abs=0.005)
    assert found["int4"] == pytest.approx(17.45, abs=0.005)
    assert found["kivi4"] == pytest.approx(17.07, abs=0.005)
    assert found["kivi2"] == pytest.approx(18.51, abs=0.005)
    assert found["sparq over int4"] == pytest.approx(15.515, abs=0.005)


def test_a_rank_holds_its_heads(folders: dict[str, Path]) -> None:
    one = capacity_of(folders["1:1"], *METHODS["int4"])
    two = capacity_of(folders["1:1"], *METHODS["int4"], tensor_parallel_size=2)
    assert [group.page_bytes for group in two.groups] == [group.page_bytes // 2 for group in one.groups]
    assert two.n_blocks == 2 * one.n_blocks


def test_stages_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="leave --pipeline-parallel-size out"):
        capacity_of(folders["plain"], *DENSE, pipeline_parallel_size=2)


def test_memory_for_less_than_a_request(folders: dict[str, Path]) -> None:
    """vLLM would refuse to start; what a GiB holds is still a number."""
    found = capacity_of(folders["plain"], *DENSE, memory_bytes=2 << 20)
    assert found.max_concurrency == 8 / 16
    assert found.n_tokens == 1024
