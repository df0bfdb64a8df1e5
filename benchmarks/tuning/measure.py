"""Measuring a setting for the tuner: loss on the user's text and on needles, bytes kept, time beside dense in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.quality.engine import Engine, Run, same_cache
from vllm_sparq.benchmarks.quality.evaluate import scored
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tuning.space import Workload

STEPS = 6
"""Decode steps of a turn."""

MIN_TURNS, MAX_TURNS, MIN_SECONDS = 5, 40, 3.0
"""Turns of each engine: as many as fit into some seconds. One more comes before them and warms up."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a setting costs and gains.

    Attributes:
        options: of the setting.
        time: per output token, as a multiple of dense's.
        tpot_ms: per output token (milliseconds).
        held: KV bytes kept for each token of the context, as a multiple of dense's.
        moved: KV bytes read per output token, as a multiple of dense's.
        bits: bits per byte of the text, more than dense's.
        needles: share of needles found, less than dense's.
    """

    options: dict[str, Any]
    time: float
    tpot_ms: float
    held: float
    moved: float
    bits: float
    needles: float

    @property
    def loss(self) -> float:
        """The larger of what is lost on the text (bits per byte) and of needles (share)."""
        return max(self.bits, self.needles)

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "loss": self.loss}


class Engines:
    """The dense engine, and the few that were used last; starting one takes longer than using it.

    Args:
        run: what is the same for all.
        limit: engines beside dense.
        report: called with a line of text when one starts.
    """

    def __init__(self, run: Run, limit: int, report: Callable[[str], None]) -> None:
        self.run, self.limit, self.report = run, limit, report
        self.running: list[Engine] = []
        self.dense = Engine(Method.named(DENSE), run)

    def __enter__(self) -> Engines:
        self.report("starting the dense engine")
        self.dense.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for engine in (self.dense, *self.running):
            if kind is None:
                engine.close()
            else:
                engine.kill()

    def for_method(self, method: Method) -> Engine:
        """An engine that reads as the method does: one that has its cache already, or a new one."""
        for engine in self.running:
            if same_cache(engine.method, method):
                self.running.remove(engine)
                engine.use(method)
                break
        else:
            while len(self.running) >= self.limit:
                self.running.pop(0).close()
            self.report(f"starting an engine for {method.name}")
            engine = Engine(method, self.run)
            engine.start()
        self.running.append(engine)
        return engine


def answers_of(engine: Engine, examples: Sequence[Example]) -> dict[str, float]:
    """Mean score of each task."""
    outputs = engine.answer(examples)
    scores: dict[str, list[float]] = {}
    for example, output in zip(examples, outputs, strict=True):
        scores.setdefault(example.task, []).append(scored(example, output)["score"])
    return {task: statistics.fmean(values) for task, values in scores.items()}


def times_in_turns(engines: Sequence[Engine], workload: Workload) -> list[tuple[float, float]]:
    """Of each engine, time per output token as a multiple of the first engine's, and in seconds.

    One decodes while the others wait, turn after turn, so that all see the same machine. A turn counts with its median
    step and an engine with its lower quartile of turns: what else the machine does only ever adds to a time.
    """
    for engine in engines:
        engine.prepare(workload.context, workload.batch)
        engine.decode(STEPS)
    turns: list[list[float]] = []
    begin = time.monotonic()
    n_most = min(MAX_TURNS, (workload.shape.max_model_len - workload.context) // STEPS - 2)
    while len(turns) < MIN_TURNS or (time.monotonic() - begin < MIN_SECONDS and len(turns) < n_most):
        turns.append([statistics.median(engine.decode(STEPS)) for engine in engines])
    seconds = [statistics.quantiles(mine, n=4)[0] for mine in zip(*turns, strict=True)]
    return [(mine / seconds[0], mine) for mine in seconds]


def measure(
    engines: Engines, method: Method, workload: Workload, examples: Sequence[Example], baseline: dict[str, float]
) -> Measured:
    """Everything about one setting; ``baseline`` has dense's score of each task.

    Raises:
        UsageError: its engine did not start, or ended.
    """
    engine = engines.for_method(method)
    scores = answers_of(engine, examples)
    _, (ratio, seconds) = times_in_turns([engines.dense, engine], workload)
    shape, context = workload.shape, workload.context
    return Measured(
        options=method.options,
        time=ratio,
        tpot_ms=1e3 * seconds,
        held=shape.held(method, context) / shape.dense_bytes,
        moved=shape.moved(method, context) / (shape.dense_bytes * context),
        bits=scores["text"] - baseline["text"],
        needles=baseline["needle"] - scores["needle"],
    )
