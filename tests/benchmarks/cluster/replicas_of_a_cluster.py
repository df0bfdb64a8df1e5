"""What `test_bench.py` runs in a process of its own: a Ray cluster of this machine, with a replica killed in it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.cluster import data as ray_data
from vllm_sparq.benchmarks.cluster import prompts
from vllm_sparq.benchmarks.cluster.replicas import Pool, cluster, engine_arguments
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.tiny_model import WEIGHTS

DTYPE = "float32"
"""As in `running_engine`: in bfloat16 an answer or two of 80 depend on the batch on CPUs with AMX, as in stock vLLM."""


def answer(data: Path, out: Path, log: Path, environment: Mapping[str, str], n_replicas: int) -> None:
    """Write to `out` all rows that answer `data`, and which of several replicas was killed after the first batch."""
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    method = Method.named("sparq")
    arguments = engine_arguments(method, gpus=0, kv_cache_mib=64, more={"dtype": DTYPE})
    sampled: dict[str, Any] = dict(temperature=0.8, batch_size=4, engine_arguments=arguments)
    pool = Pool(method=method, model=WEIGHTS, replicas=n_replicas, **sampled)
    rows: list[dict[str, Any]] = []
    killed = None
    with cluster(pool, None):
        for batch in ray_data.answers(pool, prompts.from_file(data, max_tokens=8, seed=0)()):
            rows += batch
            if killed is None and n_replicas > 1:
                killed = batch[0]["replica"]
                os.kill(int(killed.partition(":")[2]), signal.SIGKILL)
    out.write_text(json.dumps({"rows": rows, "killed": killed}))
