"""Answers through plain Ray actors with an engine each, for machines without `ray.data.llm`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from vllm_sparq.benchmarks.cluster.data import replica_name
from vllm_sparq.benchmarks.cluster.prompts import Prompt
from vllm_sparq.benchmarks.cluster.replicas import Pool, origin, preemptions, proven
from vllm_sparq.benchmarks.common.proof import engine_report

BATCHES_IN_FLIGHT = 2
"""Per replica: one that it works on, and one that is there when it is done."""


class Replica:
    """An engine in the process of an actor.

    Raises:
        WrongAttentionError: it runs another attention than the pool's method.
    """

    def __init__(self, pool: Pool) -> None:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")
        from vllm import LLM

        self.pool = pool
        # Without log stats, which `LLM` turns off, requests do not tell their preemptions.
        self.llm = LLM(str(pool.model), **{"disable_log_stats": False, **pool.engine_arguments})
        engine: Any = self.llm.llm_engine
        self.attention = proven(pool.method, [engine_report(engine.vllm_config)])
        self.origin = origin()
        self.llm.generate(["The"], use_tqdm=False)  # the first request warms up; its time does not count

    def ready(self) -> str:
        """The attention classes that run."""
        return self.attention

    def answer(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """One row per prompt; each prompt is tried alone if they fail together."""
        try:
            return self._generate(prompts)
        except Exception as error:  # of vLLM's: a prompt that is too long, for one
            if len(prompts) == 1:
                return [{"id": prompts[0].id, "error": f"{type(error).__name__}: {error}"}]
        return [row for prompt in prompts for row in self.answer([prompt])]

    def _generate(self, prompts: list[Prompt]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        started = time.time()
        sampling = [SamplingParams(**self.pool.sampling(prompt)) for prompt in prompts]
        outputs = self.llm.generate([prompt.prompt for prompt in prompts], sampling, use_tqdm=False)
        finished = time.time()
        return [
            {
                "id": prompt.id,
                "text": output.outputs[0].text,
                "token_ids": list(output.outputs[0].token_ids),
                "n_prompt_tokens": len(output.prompt_token_ids or []),
                "n_tokens": len(output.outputs[0].token_ids),
                "started": started,
                "finished": finished,
                "preemptions": preemptions(vars(output.metrics) if output.metrics else None),
                "attention": self.attention,
                "origin": self.origin,
                "replica": replica_name(),
                "error": "",
            }
            for prompt, output in zip(prompts, outputs, strict=True)
        ]


def answers(pool: Pool, prompts: Iterable[Prompt]) -> Iterator[list[dict[str, Any]]]:
    """As `ray_data.answers`. A replica that dies is started again and repeats its batches, ``pool.retries`` times."""
    import ray

    remote: Any = ray.remote(
        num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=pool.retries, max_task_retries=pool.retries
    )(Replica)
    replicas = [remote.remote(pool) for _ in range(pool.replicas)]
    try:
        ray.get([replica.ready.remote() for replica in replicas])
        rows = iter(prompts)
        working: dict[Any, Any] = {}
        idle = replicas * BATCHES_IN_FLIGHT
        while True:
            while idle and (batch := list(islice(rows, pool.batch_size))):
                replica = idle.pop(0)
                working[replica.answer.remote(batch)] = replica
            if not working:
                return
            (done,), _ = ray.wait(list(working), num_returns=1)
            idle.append(working.pop(done))
            yield ray.get(done)
    finally:
        for replica in replicas:
            ray.kill(replica)
