"""No request reads what it does not own: answers stay as they are over blocks of NaN.

Every other engine of the tests runs over such blocks as well (`tests.engine.conftest.running_engine`); here answers are
compared with those over zeros.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.poison import caches, poisoned
from tests.engine.sessions import Sessions
from tests.engine.support import EXACT, Prompts, rarely

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", EXACT["sparse"]),
    "mass": ("sparq", EXACT["mass"]),
    "sparq over int4": ("sparq", {**EXACT["sparse"], "format": "int4"}),
    "sparq over kivi2": ("kivi", {**EXACT["sparse"], "read": "sparq", "format": "kivi2"}),
    "spans over int8": ("sparq", {**EXACT["sparse spans"], "format": "int8"}),
    "infllm": ("sparq", EXACT["sparse infllm"]),
    "kivi": ("kivi", {}),
    "h2o": ("h2o", {"budget": 192, "recent": 32}),
    "h2o, evicting under pressure": ("h2o", {"budget": 192, "pressure": "evict"}),
    "streaming, bounded, kivi4": ("streaming", {"budget": 192, "prefill": "bounded", "format": "kivi4"}),
    "sparq over h2o over int8": (
        "sparq",
        {**EXACT["sparse"], "retention": "heavy_hitter", "budget": 128, "format": "int8", "prefill": "bounded"},
    ),
}
N_BLOCKS, N_TOKENS = 44, 70


def prompts_of(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in lengths]


def log_probabilities(llm: Any, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Greedy tokens with their log-probabilities, which NaN would spoil even where it changes no token."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=N_TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        [
            (token, step[token].logprob)
            for token, step in zip(out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True)
        ]
        for out in found
    ]


@pytest.mark.parametrize("method", rarely(METHODS, "mass", "kivi", "h2o"))
def test_answers_over_poison(method: str, engine: Any) -> None:
    """Alone, then all at once in a pool that preempts or evicts, in chunks, from cached blocks, and as sessions."""
    backend, options = METHODS[method]
    batch = prompts_of(1, 1, 31, 64, 150, 200, 230, 260)
    shared = [*batch[-1][:128], *prompts_of(2, 40)[0]]
    turns = {name: prompts_of(seed, 90, 50) for seed, name in enumerate("ab")}
    common = dict(block_size=32, max_model_len=448, max_num_batched_tokens=96, async_scheduling=False)
    caching = dict(enable_prefix_caching=True, disable_log_stats=False)
    with engine(backend, options, poison=False, num_gpu_blocks_override=N_BLOCKS, **common, **caching) as llm:
        runs = []
        for poison in (False, True):
            for tensor in caches(llm):
                tensor.zero_()
            assert llm.reset_prefix_cache()
            runs.append(run(llm, [*batch, shared], turns, poison=poison))
    assert runs[1] == runs[0]


def run(llm: Any, batch: list[list[int]], turns: dict[str, list[list[int]]], *, poison: bool) -> list[Any]:
    if poison:
        with poisoned(llm) as counts:
            found = run(llm, batch, turns, poison=False)
        assert max(counts) > N_BLOCKS // 2
        assert min(counts) < 8, "the pool was never full"
        return found
    return [
        log_probabilities(llm, batch[:2]),
        log_probabilities(llm, batch),
        log_probabilities(llm, batch[-2:]),
        Sessions(llm).talk(turns),
        Prompts.answers(llm, batch[:3]),
    ]


def test_poison_is_seen(engine: Any) -> None:
    """The harness works: a block that a request owns spoils its answer."""
    backend, options = METHODS["sparq"]
    (prompt,) = prompts_of(1, 100)
    with engine(backend, options, poison=False, block_size=32, async_scheduling=False) as llm:
        clean = log_probabilities(llm, [prompt])
        scheduler, tensors = llm.llm_engine.engine_core.engine_core.scheduler, caches(llm)
        plan = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            for request in scheduler.running:
                for tensor in tensors:
                    tensor[scheduler.kv_cache_manager.get_block_ids(request.request_id)[0][0]] = 0xFF
            return plan(*args, **kwargs)

        scheduler.schedule = schedule
        assert log_probabilities(llm, [prompt]) != clean
