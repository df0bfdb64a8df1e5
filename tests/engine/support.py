"""What the engine tests share: the model, prompts, options."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

MODEL = Path(os.environ.get("SPARQ_TEST_MODEL", Path(__file__).parents[2] / "benchmarks" / "tiny_model" / "weights"))

EXACT: dict[str, dict[str, Any]] = {
    # With nothing left out a sparse read is dense attention.
    "full": {"r": 64, "k": 4096, "ranking": "model", "dense_below": 0},
    "full spans": {"read": "spans", "k": 4096, "dense_below": 0},
    "full infllm": {"read": "infllm", "k": 4096, "dense_below": 0},
    # So little is read that a wrong token, channel, sum or ranking copy changes the answers.
    "sparse": {"r": 4, "k": 10, "local": 2, "mean_value": "on", "dense_below": 0},
    # The same, but how much is read differs from step to step, layer to layer and head to head.
    "mass": {"r": 4, "k": 200, "local": 2, "min_k": 2, "mass": 0.5, "mean_value": "on", "dense_below": 0},
    # Three spans of 16 tokens.
    "sparse spans": {"read": "spans", "k": 1, "dense_below": 0},
    # One span, nine of the newest, and four that are looked up.
    "sparse infllm": {"read": "infllm", "k": 224, "local": 128, "dense_below": 0},
}
N_ANSWER = 24

ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 40 << 20,
    "max_num_batched_tokens": 2048,
    "enable_prefix_caching": False,
    "seed": 0,
    "disable_log_stats": True,
}
"""Arguments of every engine that a test does not set otherwise."""

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
"""Drafts that the prompt itself gives. They load llvmlite, over which vLLM stumbles when it starts a second engine."""


def rarely(names: Iterable[str], *long: str) -> list[Any]:
    """Cases of a test, of which those named run with the long ones alone: others show nearly the same."""
    assert {*long} <= {*names}
    return [pytest.param(name, marks=pytest.mark.long if name in long else ()) for name in names]


def environment() -> None:
    """Small, offline, in-process engines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def random_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Answers to these change with all that is read."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in lengths]


class Prompts:
    """Prompts as token ids, and greedy answers to them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(7)

    def of_length(self, n_tokens: int) -> list[int]:
        """A task of about n_tokens, cut from the left to exactly that many."""
        from vllm_sparq.benchmarks.tasks import generated as tasks

        task = self.rng.choice(["repetition", "recall", "needle"])
        room = max(n_tokens + 64, 640)
        example = tasks.make_example(
            task,
            n_tokens=min(room, 4000),
            count_tokens=lambda text: len(self.tokenizer(text).input_ids),
            seed=self.rng.randrange(1 << 30),
        )
        ids = self.tokenizer(example.prompt).input_ids
        while len(ids) < n_tokens:
            ids = ids[:1] + ids
        return ids[len(ids) - n_tokens :]

    @cached_property
    def mixed(self) -> list[list[int]]:
        """Lengths around the block size and far after it, for runs that are compared with each other."""
        own = Prompts(self.tokenizer)  # the same ones, whatever was drawn before
        return [own.of_length(n) for n in (1, 7, 127, 128, 129, 255, 300, 511, 640, 900, 1300)]

    @staticmethod
    def answers(llm: Any, prompts: list[list[int]], n_tokens: int = N_ANSWER) -> list[list[int]]:
        """Greedy continuations, all prompts in one batch."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=n_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(out.outputs[0].token_ids) for out in llm.generate(requests, params, use_tqdm=False)]

    @staticmethod
    def alone(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
        """The same of each prompt while nothing else is in the engine: the yardstick of the other runs."""
        return [Prompts.answers(llm, [prompt])[0] for prompt in prompts]


N_CROWDED = 120
CROWD = (150, 180, 200, 220, 230, 250)
ROOMY: dict[str, Any] = dict(block_size=32, max_model_len=640, max_num_batched_tokens=640)
CROWDED: dict[str, Any] = dict(num_gpu_blocks_override=45, **ROOMY)
"""A pool that holds the prompts of `CROWD`, and not their answers of `N_CROWDED` tokens."""


def replayed(llm: Any) -> list[int]:
    """How many output tokens each preempted request has to compute again: a list that grows with every preemption."""
    scheduler, found = llm.llm_engine.engine_core.engine_core.scheduler, list[int]()
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.num_output_tokens)
        preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return found


def throwing_out(llm: Any, after: int) -> list[int]:
    """Every request is preempted once, when it has said so many tokens; how many were, step by step."""
    scheduler, found, known = llm.llm_engine.engine_core.engine_core.scheduler, list[int](), set[str]()
    plan = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        out = [r for r in scheduler.running if r.num_output_tokens >= after and r.request_id not in known]
        for request in out:
            scheduler.running.remove(request)
            scheduler._preempt_request(request, 0.0)
        known.update(request.request_id for request in out)
        found.extend([len(out)] if out else [])
        return plan(*args, **kwargs)

    scheduler.schedule = schedule
    return found


def assert_preemption_does_not_matter(engine: Any, backend: str, options: dict[str, Any]) -> None:
    """Requests thrown out for want of room, and all at once late in their answers, come back and answer as they did."""
    batch = random_prompts(*CROWD)
    with engine(backend, options, **CROWDED) as llm:
        replays = replayed(llm)
        together = Prompts.answers(llm, batch, N_CROWDED)
    assert max(replays, default=0) > 16, f"replayed output tokens: {replays}"
    with engine(backend, options, async_scheduling=False, **ROOMY) as llm:
        assert Prompts.answers(llm, batch, N_CROWDED) == together
        thrown_out = throwing_out(llm, after=100)
        assert Prompts.answers(llm, batch, N_CROWDED) == together
    assert sum(thrown_out) == len(batch)
