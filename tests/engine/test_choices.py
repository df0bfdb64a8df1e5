"""Requests that choose for themselves how much is read: each answers as alone under an engine of that choice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.engine.drafters import drafting
from tests.engine.support import CROWD, CROWDED, EXACT, N_CROWDED, random_prompts, replayed

pytestmark = pytest.mark.engine

ENGINE_OPTIONS = EXACT["sparse"] | {"min_k": 2}
CHOICES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    # what a request says -> the options of an engine for it alone
    "none": (None, ENGINE_OPTIONS),
    "off": ({"sparq": "off"}, ENGINE_OPTIONS | {"dense_below": 1 << 20}),
    "compression": ({"sparq.compression": 16}, ENGINE_OPTIONS | {"r": 4, "k": None, "compression": 16}),
    "r and k": ({"sparq": {"r": 2, "k": 24}}, ENGINE_OPTIONS | {"r": 2, "k": 24}),
    "mass": ({"sparq.k": 200, "sparq.mass": 0.5}, ENGINE_OPTIONS | {"k": 200, "mass": 0.5}),
}
N_REQUESTS, N_TOKENS = 64, 16


def ask(llm: Any, prompts: list[list[int]], choices: list[dict[str, Any] | None], n_tokens: int = N_TOKENS) -> Any:
    """Greedy answers of one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False, extra_args=extra)
        for extra in choices
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(out.outputs[0].token_ids) for out in llm.generate(requests, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def batch() -> list[tuple[str, list[int]]]:
    """Random prompts, whose answers change with what is read, and a choice for each."""
    rng = random.Random(3)
    names = list(CHOICES)
    return [
        (names[i % len(names)], [rng.randrange(3, 1000) for _ in range(rng.randrange(20, 300))])
        for i in range(N_REQUESTS)
    ]


@pytest.fixture(scope="module")
def started(engine: Any) -> Iterator[Callable[..., Any]]:
    """Starts engines that stay until the module ends: vLLM takes its process group down with the first that closes."""
    with ExitStack() as engines:
        yield lambda *args, **kwargs: engines.enter_context(engine(*args, kv_cache_memory_bytes=64 << 20, **kwargs))


@pytest.fixture(scope="module")
def llm(started: Any) -> Any:
    return started("sparq", ENGINE_OPTIONS, max_num_seqs=N_REQUESTS)


def read_as(llm: Any, options: dict[str, Any]) -> None:
    """Layers that read as an engine of these options does."""
    from vllm_sparq.config import parse_options

    wanted = parse_options({"sparq": options})
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    for layer in layers:
        layer.impl.rebind(wanted)


def test_each_of_64_answers_as_alone(llm: Any, batch: list[tuple[str, list[int]]]) -> None:
    prompts, choices = [prompt for _, prompt in batch], [CHOICES[name][0] for name, _ in batch]
    together = ask(llm, prompts, choices)
    alone = {}
    for name, (_, options) in CHOICES.items():
        mine = [i for i, (choice, _) in enumerate(batch) if choice == name]
        read_as(llm, options)
        alone |= {i: ask(llm, [prompts[i]], [None])[0] for i in mine}
    read_as(llm, ENGINE_OPTIONS)
    plain = ask(llm, prompts, [None] * N_REQUESTS)
    assert together == [alone[i] for i in range(N_REQUESTS)]
    for name in CHOICES:  # and each choice is one
        changed = [together[i] != plain[i] for i, (choice, _) in enumerate(batch) if choice == name]
        assert any(changed) == (name != "none"), name


def test_off_is_what_a_dense_engine_answers(llm: Any, batch: list[tuple[str, list[int]]], started: Any) -> None:
    prompts = [prompt for name, prompt in batch if name == "off"]
    off = ask(llm, prompts, [{"sparq": "off"}] * len(prompts))
    assert ask(started("sparq", {"read": "dense"}), prompts, [None] * len(prompts)) == off


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"sparq": "on"}, "neither"),
        ({"sparq.r": 65}, "use r <= 64"),
        ({"sparq.compression": 0}, "greater than or equal to 1"),
        ({"sparq.format": "int4"}, "all else is the engine's"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_when_it_arrives(llm: Any, choice: dict[str, Any], reason: str) -> None:
    """And the engine goes on."""
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=reason):
        ask(llm, [[5, 6, 7]], [choice])
    assert not llm.llm_engine.has_unfinished_requests()
    assert ask(llm, [[5, 6, 7]], [{"sparq": "off"}], n_tokens=2)


def test_who_goes_past_the_front_end_is_refused_alone(llm: Any, batch: list[tuple[str, list[int]]]) -> None:
    """A program may hand the engine a request of its own making: in a core's process what is raised ends it alone."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine import EngineCoreRequest

    request = EngineCoreRequest(
        request_id="own",
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(extra_args={"sparq.k": 0}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    core = llm.llm_engine.engine_core.engine_core
    with pytest.raises(VLLMValidationError, match="k=0 is not usable"):
        core.preprocess_add_request(request)  # which vLLM calls within an `except` of its own
    assert not core.scheduler.requests
    assert len(ask(llm, [batch[0][1]], [None])[0]) == N_TOKENS


OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "over codes": ("sparq", ENGINE_OPTIONS | {"format": "int4"}, {}),
    "where tokens are evicted": ("h2o", ENGINE_OPTIONS | {"read": "sparq", "budget": 160, "recent": 32}, {}),
    "drafts": (
        "sparq",
        ENGINE_OPTIONS,
        {"speculative_config": drafting("Echo", 3)},
    ),
    "spans": ("quest", EXACT["sparse spans"], {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_beside_each_other_as_alone(other: str, started: Any) -> None:
    backend, options, engine_args = OTHERS[other]
    choices: list[dict[str, Any] | None] = [None, {"sparq": "off"}, {"sparq.k": 70}]
    llm = started(backend, options, block_size=32, **engine_args)
    rng = random.Random(4)
    batch = [[rng.randrange(3, 1000) for _ in range(n)] for n in (170, 255, 190, 128, 300, 210)]
    mine = [choices[i % len(choices)] for i in range(len(batch))]
    together = ask(llm, batch, mine, n_tokens=32)
    assert together == [ask(llm, [batch[i]], [mine[i]], n_tokens=32)[0] for i in range(len(batch))]
    plain = ask(llm, batch, [None] * len(batch), n_tokens=32)
    assert [i for i in range(len(batch)) if together[i] != plain[i]]


@pytest.fixture(scope="module")
def cached(started: Any) -> Any:
    """An engine with a prefix cache, whose pool is small."""
    pool = {**CROWDED, "max_model_len": 512, "max_num_batched_tokens": 512}
    return started("sparq", ENGINE_OPTIONS, enable_prefix_caching=True, disable_log_stats=False, **pool)


def metric(llm: Any, name: str) -> float:
    return float(next(found.value for found in llm.get_metrics() if found.name == f"vllm:{name}"))


def test_after_a_preemption(cached: Any) -> None:
    """What is computed again is read as it was chosen."""
    batch = random_prompts(*CROWD)
    choices: list[dict[str, Any] | None] = [None, {"sparq": "off"}, {"sparq.k": 30}] * 2
    replays = replayed(cached)
    together = ask(cached, batch, choices, n_tokens=N_CROWDED)
    assert max(replays, default=0) > 16
    for i in (0, 2, 4):  # two at a time have room
        assert cached.reset_prefix_cache()
        before = len(replays)
        assert ask(cached, batch[i : i + 2], choices[i : i + 2], n_tokens=N_CROWDED) == together[i : i + 2]
        assert len(replays) == before


@pytest.mark.parametrize(
    ("choice", "n_shared"), [(None, 288), ({"sparq.k": 30}, 288), ({"sparq": "off"}, 416)], ids=str
)
def test_blocks_of_an_answer_are_shared_where_it_was_read_densely(cached: Any, choice: Any, n_shared: int) -> None:
    """Then they hold what a prompt would have written, for anybody; otherwise the prompt's blocks alone are found."""
    rng = random.Random(2)
    assert cached.reset_prefix_cache()
    prompt = [rng.randrange(3, 1000) for _ in range(300)]
    (answer,) = ask(cached, [prompt], [choice], n_tokens=130)
    before = metric(cached, "prefix_cache_hits")
    ask(cached, [[*prompt, *answer, 5, 6, 7]], [None], n_tokens=4)
    assert metric(cached, "prefix_cache_hits") - before == n_shared
