"""How the calls of `vllm-sparq bench ops` are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from vllm_sparq.benchmarks.ops.cell import Call

FLUSH_BYTES = 128 << 20
"""Read before each sample, so that no cache still holds what the op wants: several times a big L3."""

BANDWIDTH_BYTES = 256 << 20
"""Read, once per round, to measure what the memory can do."""

TRIALS = 5
"""Samples per setting to find the best one of a method that has several."""

CLOCKS: dict[str, Callable[[], int]] = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}


@dataclass
class Stopwatch:
    """Times one call from a cold cache."""

    clock: str
    threads: int

    def __post_init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 4)
        self._stream = torch.ones(BANDWIDTH_BYTES // 4)

    def sample(self, call: Call) -> float:
        """Microseconds."""
        self._flush.sum()
        now = CLOCKS[self.clock]
        start = now()
        call.run()
        spent = now() - start
        return spent / 1e3 / (self.threads if self.clock == "cpu" else 1)

    def bandwidth(self) -> float:
        """GB/s of a plain read."""
        return BANDWIDTH_BYTES / 1e3 / self.sample(Call("read", lambda: self._stream.sum()))

    def best(self, calls: Iterable[Call], trials: int = TRIALS) -> Call | None:
        """The fastest of several settings in a short trial; None of none."""
        tried = [(statistics.median(self.sample(call) for _ in range(trials)), call) for call in calls]
        return min(tried, key=lambda trial: trial[0])[1] if tried else None

    def ready(self, calls: Mapping[str, Iterable[Call]], trials: int = TRIALS) -> dict[str, Call]:
        """Of the methods that can run, each at its best setting."""
        best = {name: self.best(settings, trials) for name, settings in calls.items()}
        return {name: call for name, call in best.items() if call is not None}

    def rounds(
        self, calls: Mapping[str, Call], repeats: int, limit: Callable[[], float], tick: Callable[[], None]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """What the machine can do, by ``limit``, and the microseconds of every call: once each in every round."""
        limits: list[float] = []
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            limits.append(limit())
            for name, call in calls.items():
                samples[name].append(self.sample(call))
            tick()
        return limits, samples


def spread(samples: Iterable[float]) -> tuple[float, float]:
    """Their 10th and their 90th percentile."""
    ranked = sorted(samples)
    return ranked[len(ranked) // 10], ranked[-1 - len(ranked) // 10]


def microseconds(median: float) -> str:
    """For a table."""
    return f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
