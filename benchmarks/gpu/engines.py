"""The engines of `gpu_engine.py`: which are started in which order, on which model, and what is asked of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.engine.cases import LLAMA_1B, Case

LLAMA_8B: dict[str, Any] = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""The shape of Llama-3.1-8B."""

SHAPES = {"8b": LLAMA_8B, "1b": {**LLAMA_1B, "num_hidden_layers": 16}}
"""Name -> config.json; of 1b, all layers of Llama-3.2-1B."""

METHODS = ("sparq", "kivi", "quest", "h2o", "flexgen", "streaming", "sparq+int4")
"""Beside dense, what is worth most first."""

MAX_MODEL_LEN = 131072

CASES = (Case(context=32768, batch=16), Case(context=32768, batch=8), Case(context=129024, batch=1))
"""An engine decodes those that its cache has room for; of one context the largest that it has."""

ROOM_FOR_ANSWERS = 256
"""Tokens of each request that decode steps may take."""

SECONDS = {"8b": 75.0, "1b": 45.0}
"""Of one engine on an H100, its start included: a guess, which the budget corrects."""

CAPTURE_SHARE = 0.6
"""Of these where nothing is compiled and captured."""


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One engine, from its start to its end.

    Attributes:
        model: a key of `SHAPES`.
        method: what it runs.
        graphs: vLLM's default, or ``--enforce-eager``.
        round: which time it is that this engine is started.
    """

    model: str
    method: Method
    graphs: bool = True
    round: int = 1

    @property
    def name(self) -> str:
        """Such as 8b/sparq/graphs."""
        again = f"/{self.round}" if self.round > 1 else ""
        return f"{self.model}/{self.method.name}/{'graphs' if self.graphs else 'eager'}{again}"

    @property
    def seconds(self) -> float:
        return SECONDS[self.model] * (1.0 if self.graphs else CAPTURE_SHARE)

    @property
    def eager(self) -> EngineJob:
        """The same without graphs: what to try when it has died with them."""
        return replace(self, graphs=False)


def jobs(models: Sequence[str], names: Sequence[str], rounds: int) -> list[EngineJob]:
    """All engines, in the order of what they are worth.

    Default settings come first, since they fail where ``--enforce-eager`` does not. Dense stands next to the methods
    that are compared with it, and a second round repeats the order, so that a drift of the clocks is seen.

    Raises:
        UsageError: a name that means nothing.
    """
    methods = [Method.named(name) for name in dict.fromkeys([DENSE, *names])]
    first, others = methods[:2], methods[2:]
    found = [EngineJob(model=model, method=method) for model in models for method in first]
    found += [EngineJob(model=models[0], method=method) for method in others]
    found += [EngineJob(model=models[0], method=method, graphs=False) for method in first]
    again = [EngineJob(model=models[0], method=method, round=n) for n in range(2, rounds + 1) for method in methods]
    found += again
    found += [EngineJob(model=model, method=method) for model in models[1:] for method in others]
    found += [EngineJob(model=model, method=method, graphs=False) for model in models for method in methods]
    return list({job.name: job for job in found}.values())


def with_eager(planned: Sequence[EngineJob], failed: set[str], known: set[str]) -> Iterator[EngineJob]:
    """The jobs but for those ``known``, and after one that is among the ``failed`` by then the same without graphs."""
    given = set(known)
    for job in planned:
        if job.name not in given:
            given.add(job.name)
            yield job
        if job.graphs and job.name in failed and job.eager.name not in given:
            given.add(job.eager.name)
            yield job.eager


def room_for(case: Case, method: Method, capacity_tokens: int) -> str | None:
    """Why a cache has no room for a case, if so; methods that evict cut prompts to their budget."""
    needed = case.batch * (case.context + ROOM_FOR_ANSWERS)
    if method.backend is not None and method.parsed.retention != "all":
        return None
    return None if needed <= capacity_tokens else f"needs {needed:,} tokens, and the cache holds {capacity_tokens:,}"
