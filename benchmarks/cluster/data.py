"""Answers through Ray Data LLM: a fixed pool of engine replicas that Ray restarts and whose lost batches it repeats."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from vllm_sparq.benchmarks.cluster.prompts import Prompt
from vllm_sparq.benchmarks.cluster.replicas import Pool, origin, preemptions, proven, ray_silence

START_TIMEOUT_S = 900


def answers(pool: Pool, prompts: Iterable[Prompt]) -> Iterator[list[dict[str, Any]]]:
    """Answers in the order in which they are ready, a batch at a time; needs a connection to a cluster.

    A row that failed has a text under ``error`` and no answer.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray_silence()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = START_TIMEOUT_S  # no replica works before all are there: they are measured together
    context.actor_task_retry_on_errors = False  # of the system's errors; a row's own are told in its row
    config = vLLMEngineProcessorConfig(
        model_source=str(pool.model),
        engine_kwargs=dict(pool.engine_arguments),
        batch_size=pool.batch_size,
        concurrency=(pool.replicas, pool.replicas),
        placement_group_config={"bundles": [{"CPU": pool.cpus, "GPU": pool.gpus}]},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
        should_continue_on_error=True,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {"sampling_params": pool.sampling(Prompt(**row))},
        postprocess=answer_of,
    )
    stage = processor.get_stage_by_name("vLLMEngineStage")
    # An assignment would run the stage's validators once more, which then forget the bundles and reserve a GPU.
    vars(stage)["fn"] = proving(stage.fn, pool)
    rows = iter(prompts)
    blocks: list[Any] = []
    while batch := list(islice(rows, pool.batch_size)):
        blocks.append(ray.put(_table(batch)))  # one at a time: the driver never holds the prompts
    data = processor(ray.data.from_arrow_refs(blocks))
    tables: Iterator[Any] = iter(data.iter_batches(batch_size=None, batch_format="pyarrow"))
    for table in tables:
        yield table.to_pylist()


def proving(stage: type, pool: Pool) -> type:
    """The engine stage of Ray Data LLM, with the proof of its attention and its own name in every row it answers."""

    class ProvingEngine(stage):
        proof: asyncio.Task[tuple[str, str]] | None = None

        async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
            if self.proof is None:
                self.proof = asyncio.create_task(self.prove(batch[0]))
            attention, made_by = await self.proof  # batches run side by side, and none of them before the proof
            about = {"attention": attention, "origin": made_by, "replica": replica_name(), "started": time.time()}
            async for row in super().udf(batch):
                # A row that failed would go round `answer_of`, with other columns than the rest of its block.
                failed = {"error": row["__inference_error__"], "__inference_error__": ""}
                yield {**row, **failed, **about, "finished": time.time()}

        async def prove(self, row: dict[str, Any]) -> tuple[str, str]:
            """Attention classes and origin, after a request whose time does not count, since the first one warms up."""
            try:
                reports: Any = await self.llm.engine.collective_rpc("attention_report")
            except Exception as error:  # whatever vLLM raises where a worker does not know the method
                reports = error
            attention = proven(pool.method, reports)
            with contextlib.suppress(Exception):  # a row that cannot be answered says so when it is its turn
                await self.llm.generate_async(copy.deepcopy(row))  # which takes the row apart
            return attention, origin()

    return ProvingEngine


def replica_name() -> str:
    """Node and process of this replica."""
    return f"{socket.gethostname()}:{os.getpid()}"


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of an answer, from those of Ray Data LLM."""
    return {
        "id": row["id"],
        "text": row["generated_text"],
        "token_ids": list(row["generated_tokens"]),
        "n_prompt_tokens": row["num_input_tokens"],
        "n_tokens": row["num_generated_tokens"],
        "started": row["started"],
        "finished": row["finished"],
        "preemptions": 0 if row["error"] else preemptions(row.get("metrics")),
        "attention": row["attention"],
        "origin": row["origin"],
        "replica": row["replica"],
        "error": row["error"],
    }


def _table(batch: list[Prompt]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist([asdict(prompt) for prompt in batch])
