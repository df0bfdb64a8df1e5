"""Eviction in real engines: a request answers the same however it is run, holds what it should, and gives it back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_models import llama
from tests.engine.support import EXACT, Prompts, random_prompts, replayed, throwing_out

pytestmark = pytest.mark.engine

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "h2o": ("h2o", {"budget": 96, "recent": 32}),
    "h2o, bounded": ("h2o", {"budget": 0.3, "prefill": "bounded"}),
    "streaming, bounded, kivi4": ("streaming", {"budget": 192, "prefill": "bounded", "format": "kivi4"}),
    "sparq over h2o over int8": (
        "sparq",
        {**EXACT["sparse"], "retention": "heavy_hitter", "budget": 128, "format": "int8", "prefill": "bounded"},
    ),
    "sparq over streaming": (
        "sparq",
        {**EXACT["sparse"], "ranking": "int8", "retention": "window", "sinks": 20, "budget": 128},
    ),
}


@pytest.fixture(scope="module")
def some(prompts: Prompts) -> list[list[int]]:
    return [prompts.mixed[i] for i in (1, 5, 6, 9, 10)]


def value(llm: Any, name: str) -> float:
    return float(next(m.value for m in llm.get_metrics() if m.name == name))


def pool_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


@pytest.mark.parametrize("method", METHODS)
def test_same_answers(method: str, engine: Any, some: list[list[int]]) -> None:
    """Alone, in a batch, in chunks: one answer; and everything is given back."""
    backend, options = METHODS[method]
    with engine(backend, options, block_size=32) as llm:
        n_free = pool_of(llm).get_num_free_blocks()
        alone = Prompts.alone(llm, some)
        assert pool_of(llm).get_num_free_blocks() == n_free
        assert Prompts.answers(llm, some) == alone, "in one batch"
    with engine(backend, options, block_size=32, max_num_batched_tokens=64, max_num_seqs=8) as llm:
        assert Prompts.answers(llm, some) == alone, "chunks of 64"


@pytest.mark.long
@pytest.mark.parametrize("method", ["h2o", "sparq over h2o over int8", "sparq over streaming"])
def test_compiled(method: str, engine: Any, some: list[list[int]]) -> None:
    backend, options = METHODS[method]
    with engine(backend, options, block_size=32) as llm:
        eager = Prompts.answers(llm, some)
    with engine(backend, options, block_size=32, max_num_batched_tokens=256, enforce_eager=False) as llm:
        assert Prompts.answers(llm, some) == eager


def test_eviction_shows(engine: Any, some: list[list[int]]) -> None:
    """Answers differ from dense ones, and each method's from the others': something is evicted, and not the same."""
    found = {}
    for name, backend, options in (("dense", "CPU_ATTN", {}), *((m, *METHODS[m]) for m in METHODS)):
        with engine(backend, options, **({} if name == "dense" else {"block_size": 32})) as llm:
            found[name] = Prompts.answers(llm, some)
    assert all(answers[0] == found["dense"][0] for answers in found.values()), "a prompt below every budget"
    assert len({str(answers) for answers in found.values()}) == len(found)


@pytest.mark.parametrize("method", METHODS)
def test_preemption(method: str, engine: Any) -> None:
    """Requests thrown out, for want of room or after they evicted, come back and evict what they had evicted before."""
    batch, n_tokens = random_prompts(70, 80, 95, 60, 75, 90), 130
    backend, options = METHODS[method]
    options = {**options, "budget": 128}
    room = dict(block_size=32, max_model_len=256, max_num_batched_tokens=256, async_scheduling=False)
    with engine(backend, options, **room, num_gpu_blocks_override=20 if "format" in options else 15) as llm:
        replays = replayed(llm)
        together = Prompts.answers(llm, batch, n_tokens)
    assert max(replays, default=0) > 16
    with engine(backend, options, **room) as llm:
        assert Prompts.answers(llm, batch, n_tokens) == together
        thrown_out = throwing_out(llm, after=110)  # 170 tokens and more, of which 128 stay
        assert Prompts.answers(llm, batch, n_tokens) == together
    assert sum(thrown_out) == len(batch)


def test_pressure_evicts_instead(engine: Any) -> None:
    """The same trace: nobody is preempted, everybody answers in full, and runs of it are alike."""
    rng = random.Random(1)
    batch = [[rng.randrange(3, 1000) for _ in range(n)] for n in (70, 80, 95, 60, 75, 90)]
    pool = dict(num_gpu_blocks_override=22, block_size=32, max_model_len=448, max_num_batched_tokens=448)
    answers = []
    for _ in range(2):
        with engine("h2o", {"budget": 192, "pressure": "evict"}, **pool, disable_log_stats=False) as llm:
            answers.append(Prompts.answers(llm, batch, n_tokens=220))
            assert value(llm, "vllm:num_preemptions") == 0
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            assert scheduler.n_preemptions_avoided > 0
            assert scheduler.n_blocks_taken > 0
            assert pool_of(llm).get_num_free_blocks() == 21
    assert [len(tokens) for tokens in answers[0]] == [220] * len(batch)
    assert answers[0] == answers[1]


@pytest.mark.long
def test_tensor_parallel(engine: Any, some: list[list[int]]) -> None:
    """Two workers that share nothing but the scheduler's orders, under pressure too."""
    backend, options = "h2o", {"budget": 192, "pressure": "evict", "prefill": "bounded"}
    rng = random.Random(1)
    batch = [[rng.randrange(3, 1000) for _ in range(n)] for n in (170, 180, 195, 160)]
    common = dict(num_gpu_blocks_override=24, block_size=32, max_model_len=640)
    with engine(backend, options, **common) as llm:
        one = Prompts.answers(llm, batch)
    with engine(backend, options, **common, tensor_parallel_size=2) as llm:
        assert Prompts.answers(llm, batch) == one
        reports = llm.collective_rpc("attention_report")
    assert len(reports) == 2
    assert {layer["backend"] for report in reports for layer in report.values()} == {"H2O"}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small layer with room for 16k tokens."""
    return llama(tmp_path_factory.mktemp("long"), seed=0, num_hidden_layers=1, max_position_embeddings=16384)


def long(model: Path, n_blocks: int, max_model_len: int = 8192) -> dict[str, Any]:
    return dict(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        num_gpu_blocks_override=n_blocks,
        block_size=128,
        max_num_batched_tokens=max_model_len,
        disable_log_stats=False,
    )


@pytest.mark.parametrize("prefill", ["bounded", "full"])
def test_eight_long_requests_in_the_memory_of_two(prefill: str, engine: Any, long_model: Path) -> None:
    rng = random.Random(2)
    batch = [[rng.randrange(3, 128) for _ in range(4000)] for _ in range(8)]
    options = {"budget": 512, "prefill": prefill}
    with engine("h2o", options, **long(long_model, 2 * 32 + 1, 4096)) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        single = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        allocate, peak, steady = single.allocate_new_blocks, [0], [0]

        def watch(request_id: str, *args: Any, **kwargs: Any) -> Any:
            blocks = allocate(request_id, *args, **kwargs)
            n_held = len(single.req_to_blocks[request_id])
            peak[0] = max(peak[0], n_held)
            if request_id in single.answering:
                steady[0] = max(steady[0], n_held)
            return blocks

        single.allocate_new_blocks = watch
        answers = Prompts.answers(llm, batch, n_tokens=40)
        assert value(llm, "vllm:num_preemptions") == 0
        assert pool_of(llm).get_num_free_blocks() == 2 * 32
    assert [len(tokens) for tokens in answers] == [40] * 8
    assert steady[0] == 4  # 512 tokens
    assert peak[0] == (4 + 2 if prefill == "bounded" else 32)


def test_a_thousand_requests_with_aborts_leave_nothing(engine: Any, long_model: Path) -> None:
    from vllm import SamplingParams

    rng = random.Random(4)
    options = {"budget": 200, "prefill": "bounded", "pressure": "evict", "format": "int8"}
    with engine("h2o", options, **{**long(long_model, 120), "block_size": 32, "max_num_batched_tokens": 2048}) as llm:
        core, n_free = llm.llm_engine, pool_of(llm).get_num_free_blocks()
        finished, running = 0, []
        for i in range(1000):
            params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 40), ignore_eos=True, detokenize=False)
            prompt = [rng.randrange(3, 128) for _ in range(rng.choice([1, 20, 90, 300, 700]))]
            core.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
            running.append(f"r{i}")
            if i % 8 == 7:
                core.abort_request([running.pop(rng.randrange(len(running))) for _ in range(2)])
                for _ in range(rng.randrange(1, 12)):
                    done = [out.request_id for out in core.step() if out.finished]
                    finished += len(done)
                    running = [name for name in running if name not in done]
        while core.has_unfinished_requests():
            finished += sum(out.finished for out in core.step())
        assert finished >= 700
        assert pool_of(llm).get_num_free_blocks() == n_free


def test_a_request_beyond_the_pool_fails_alone(engine: Any, long_model: Path) -> None:
    """A prompt that no start would promise to hold is refused, and the others answer; so is such a start."""
    from vllm.exceptions import VLLMValidationError

    rng = random.Random(5)
    batch = [[rng.randrange(3, 128) for _ in range(n)] for n in (100, 9000, 200)]
    with engine("h2o", {"budget": 512, "prefill": "bounded"}, **long(long_model, 30)) as llm:
        with pytest.raises(VLLMValidationError, match="8192"):
            Prompts.answers(llm, batch[1:2])
        assert [len(tokens) for tokens in Prompts.answers(llm, [batch[0], batch[2]])] == [24, 24]
    with pytest.raises(ValueError, match="KV cache"), engine("h2o", {"budget": 512}, **long(long_model, 30)):
        pass
