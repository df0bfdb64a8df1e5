"""`lossless`: the tokens are those of dense attention, however bad the read is that drafts them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.support import CROWD, CROWDED, EXACT, N_CROWDED, NGRAM, ROOMY, Prompts, random_prompts, replayed
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.speculation import lossless_refusals
from vllm_sparq.config import parse_options

pytestmark = pytest.mark.engine

# So little is read that many drafts are wrong; the mean value makes some of them very wrong.
BAD = {**EXACT["sparse"], "lossless": True}
READS: dict[str, dict[str, Any]] = {
    "one draft": {**BAD, "drafts": 1},
    "three": BAD,
    "six": {**BAD, "drafts": 6},
    "quest": {**EXACT["sparse spans"], "lossless": True},
    "adaptive": {**EXACT["mass"], "lossless": True},
}
ASYNC = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
OURS = "vllm_sparq.scheduler.prompts.PromptCachingScheduler"
OTHER = {"method": "custom_class", "model": "some.Proposer", "num_speculative_tokens": 2}
DRAFTS_ITSELF = "is speculative decoding itself: leave --speculative-config out"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no sparse read": ({"read": "dense"}, {}, "drafts by a sparse read, and read='dense' is none: use read"),
    "codes": ({"format": "int4"}, {}, r"takes drafts back.*use format 'model'"),
    "another drafter": ({}, {"speculative_config": NGRAM}, DRAFTS_ITSELF),
    "somebody else's proposer": ({}, {"speculative_config": OTHER}, DRAFTS_ITSELF),
    "half a model": ({}, {"pipeline_parallel_size": 2}, "runs whole models alone so far: leave --pipeline-parallel"),
    "a scheduler": (
        {},
        {"scheduler_cls": ASYNC},
        r"needs our scheduler, and --scheduler-cls names \S+: leave it out \[",
    ),
    "sharing beside it": (
        {"sharing": "all"},
        {"scheduler_cls": ASYNC},
        r"needs our scheduler.* names \S+: leave it out \[",
    ),
    "another of ours": ({}, {"scheduler_cls": OURS}, r"needs our scheduler.*PromptCachingScheduler: leave it out"),
}
"""What it is combined with -> options, arguments of the engine, and what the user reads."""

RUNS: dict[str, dict[str, Any]] = {
    "chunks of 64": dict(max_num_batched_tokens=64, max_num_seqs=8),
    "prefix caching": dict(enable_prefix_caching=True, max_num_batched_tokens=256),
    "blocks of 32": dict(block_size=32),
    "compiled": dict(enforce_eager=False),
}

N_MANY, N_ANSWERS = 200, 24
PRESSED: dict[str, Any] = dict(
    max_num_seqs=32, max_num_batched_tokens=128, num_gpu_blocks_override=40, block_size=32, enable_prefix_caching=True
)
"""Batches, prompts in chunks, a pool for a part of the requests, and prompts of which a part is cached."""


@pytest.fixture(autouse=True)
def _drafting_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted does not follow the clock of the machine that tests."""
    from vllm_sparq.attention_backends.pace import Pace

    monkeypatch.setattr(Pace, "n_drafts", lambda self, n_tokens: self.most)


@pytest.fixture(scope="module")
def dense(engine: Any, prompts: Prompts) -> list[list[int]]:
    with engine("CPU_ATTN") as llm:
        return prompts.answers(llm, prompts.mixed, 40)


def numbers(llm: Any) -> dict[str, float]:
    return {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}


@pytest.mark.parametrize("name", READS)
def test_tokens_are_those_of_dense_attention(name: str, engine: Any, prompts: Prompts, dense: list[list[int]]) -> None:
    """Prompts around the block size and far after it; some drafts are accepted, and some are not."""
    with engine("sparq", READS[name], disable_log_stats=False) as llm:
        assert prompts.answers(llm, prompts.mixed, 40) == dense
        found = numbers(llm)
    assert 0 < found["spec_decode_num_accepted_tokens"] < found["spec_decode_num_draft_tokens"]


@pytest.fixture(scope="module")
def many(prompts: Prompts) -> list[list[int]]:
    """Of up to eight blocks of 32: tasks of the bundled model, random tokens, and what begins as the prompt before."""
    rng, found = random.Random(12), list[list[int]]()
    for i in range(N_MANY):
        n = rng.randrange(1, 257)
        random_tokens = [rng.randrange(3, 1000) for _ in range(n)]
        found.append([prompts.of_length(n), random_tokens, [*found[-1][:128], *random_tokens][:n]][i % 3] if i else [3])
    return found


@pytest.fixture(scope="module")
def dense_of_many(engine: Any, many: list[list[int]]) -> list[list[int]]:
    with engine("CPU_ATTN", max_model_len=320) as llm:
        return Prompts.answers(llm, many, N_ANSWERS)


@pytest.mark.long
@pytest.mark.parametrize("n_drafts", range(1, 7))
def test_200_prompts_answer_as_under_stock_vllm(n_drafts: int, engine: Any, many: Any, dense_of_many: Any) -> None:
    """Batched, in chunks, preempted, from cached blocks, all at once."""
    options = {**BAD, "drafts": n_drafts}
    with engine("sparq", options, max_model_len=320, disable_log_stats=False, **PRESSED) as llm:
        found = Prompts.answers(llm, many, N_ANSWERS)
        again = Prompts.answers(llm, many[-10:], N_ANSWERS)
        ended = numbers(llm)
    equal = sum(answer == other for answer, other in zip(found, dense_of_many, strict=True))
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions", "prefix_cache_hits")
    drafted, accepted, preempted, cached = (ended[name] for name in names)
    print(f"{n_drafts} drafts: {equal} of {N_MANY} equal, {accepted:.0f} of {drafted:.0f} drafts accepted,", end=" ")
    print(f"{preempted:.0f} preemptions, {cached:.0f} tokens cached")
    assert equal == N_MANY
    assert again == dense_of_many[-10:]
    assert 0.1 * drafted < accepted < 0.9 * drafted
    assert min(preempted, cached) > 0


def disagree(worker: Any) -> None:
    """What each worker's clock says of each step: the first one's word counts."""
    turns = itertools.cycle([3, 0, 1, 2, 3] if worker.rank == 0 else [0, 2, 3, 0, 1, 3, 3])
    worker.model_runner.drafter.pace.n_drafts = lambda n_tokens: next(turns)


@pytest.mark.long
def test_tensor_parallel(engine: Any, prompts: Prompts, dense: list[list[int]]) -> None:
    """Two workers whose clocks disagree draft alike; otherwise one would wait for the other forever."""
    with engine("sparq", BAD, tensor_parallel_size=2, disable_log_stats=False) as llm:
        llm.collective_rpc(disagree)
        assert prompts.answers(llm, prompts.mixed, 40) == dense
        ended = numbers(llm)
    drafted, accepted = (ended[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    print(f"two workers: {accepted:.0f} of {drafted:.0f} drafts accepted")
    assert 0 < accepted < drafted


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=pytest.mark.long if run == "compiled" else ()) for run in RUNS]
)
def test_however_they_are_run(run: str, engine: Any, prompts: Prompts, dense: list[list[int]]) -> None:
    with engine("sparq", BAD, **RUNS[run]) as llm:
        assert prompts.answers(llm, prompts.mixed, 40) == dense
        if run == "prefix caching":
            assert prompts.answers(llm, prompts.mixed, 40) == dense, "from cached blocks"


def test_preemption(engine: Any) -> None:
    """A pool without room for all requests and what they draft."""
    batch = random_prompts(*CROWD)
    with engine("CPU_ATTN", **ROOMY) as llm:
        dense = Prompts.answers(llm, batch, N_CROWDED)
    with engine("sparq", BAD, **CROWDED) as llm:
        replays = replayed(llm)
        assert Prompts.answers(llm, batch, N_CROWDED) == dense
    assert max(replays, default=0) > 16


def test_up_to_the_model_s_last_position(engine: Any, prompts: Prompts) -> None:
    prompt = [prompts.of_length(200)]
    with engine("CPU_ATTN", max_model_len=256) as llm:
        dense = prompts.answers(llm, prompt, 56)
    with engine("sparq", BAD, max_model_len=256) as llm:
        assert prompts.answers(llm, prompt, 56) == dense


def test_nothing_is_drafted_where_all_is_read(engine: Any, prompts: Prompts, dense: list[list[int]]) -> None:
    """A draft would cost what a token costs."""
    with engine("sparq", {"lossless": True, "dense_below": 5000}, disable_log_stats=False) as llm:
        assert prompts.answers(llm, prompts.mixed, 40) == dense
        assert numbers(llm)["spec_decode_num_draft_tokens"] == 0


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_be_combined_with(what: str, engine: Any) -> None:
    """Before the model loads: with other schedulers drafts would go into blocks that nobody owns."""
    options, arguments, message = REFUSED[what]
    with pytest.raises(ValueError, match=f"sparq cannot start:.*lossless=True {message}"):
        engine("sparq", {"lossless": True, **options}, **arguments).__enter__()


def test_engines_that_share_experts_are_refused() -> None:
    """One would run experts on its drafts while the others wait for it elsewhere."""
    model = SimpleNamespace(is_moe=True, uses_mrope=False, is_hybrid=False, hf_text_config=None)
    parallel = SimpleNamespace(data_parallel_size=2, pipeline_parallel_size=1)
    config = SimpleNamespace(model_config=model, parallel_config=parallel, speculative_config=None, lora_config=None)
    options = parse_options({"sparq": {"lossless": True}})
    (reason,) = lossless_refusals(config, PagedEngine(backend="sparq", options=options, block_size=128))
    assert "step together: leave --data-parallel-size out" in reason
    model.is_moe = False
    assert not lossless_refusals(config, PagedEngine(backend="sparq", options=options, block_size=128))


def test_the_second_model_runner_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(
        ValueError, match=r"sparq cannot start:.*lossless=True needs vLLM's model runner V1.*unset VLLM_"
    ):
        engine("sparq", {"lossless": True}).__enter__()


def chi_square(samples: tuple[list[tuple[int, ...]], list[tuple[int, ...]]]) -> tuple[float, int]:
    """Whether two samples of sequences have one distribution: how often each token follows each beginning.

    Given a beginning, its next tokens are draws of one kind, so that what their tables of two rows say adds up.

    Returns:
        The statistic, and its degrees of freedom. Tokens that were seen less than ten times count as one.
    """
    follow: dict[tuple[int, ...], tuple[Counter[int], Counter[int]]] = {}
    for i, sequences in enumerate(samples):
        for sequence in sequences:
            for n in range(1, len(sequence)):
                follow.setdefault(sequence[:n], (Counter(), Counter()))[i][sequence[n]] += 1
    statistic, freedom = 0.0, 0
    for counts in follow.values():
        both = counts[0] + counts[1]
        often = [token for token in both if both[token] >= 10]
        rare = sum(both.values()) - sum(both[token] for token in often)
        columns = [[count[token] for count in counts] for token in often]
        if rare >= 10:
            columns.append([count.total() - sum(count[token] for token in often) for count in counts])
        table = torch.tensor(columns, dtype=torch.float64)
        if len(columns) < 2 or not table.sum(0).all():
            continue
        expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
        statistic, freedom = statistic + float(((table - expected) ** 2 / expected).sum()), freedom + len(columns) - 1
    return statistic, freedom


@pytest.mark.long
def test_samples_have_the_distribution_of_dense_attention(engine: Any, prompts: Prompts) -> None:
    """20,000 tokens after the first ones, which nobody drafts, of each engine; each request has a seed of its own."""
    from vllm import SamplingParams

    prompt, n = {"prompt_token_ids": prompts.of_length(150)}, 5000
    samples, cached = [], dict(enable_prefix_caching=True, disable_log_stats=False)
    for backend, options in (("CPU_ATTN", {}), ("sparq", BAD)):
        seeds = range(n * len(samples), n * (len(samples) + 1))
        with engine(backend, options, max_num_seqs=64, max_model_len=512, **cached) as llm:
            params = [SamplingParams(temperature=0.8, max_tokens=5, ignore_eos=True, seed=seed) for seed in seeds]
            found, ended = llm.generate([prompt] * n, params, use_tqdm=False), numbers(llm)
        samples.append([tuple(out.outputs[0].token_ids) for out in found])
    statistic, freedom = chi_square((samples[0], samples[1]))
    likely = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))
    drafted, accepted = (ended[f"spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    print(f"chi square {statistic:.1f} of {freedom} degrees of freedom: p = {likely:.3f}")
    print(f"{accepted:.0f} of {drafted:.0f} drafts accepted")
    assert freedom > 50
    assert likely > 1e-3
    assert 0.1 < accepted / drafted < 0.9
