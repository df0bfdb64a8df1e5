"""How long things take on a GPU: replays of CUDA graphs with a cold L2, in turns; the host's share; each kernel's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Step = Callable[[], object]

N_SAMPLES = 20
N_HOST_CALLS = 30
FLUSH_BYTES = 256 << 20
"""Several times the L2 of an H200."""

COPY_BYTES = 4 << 30


def capture(step: Step) -> Step:
    """What replays a graph of ``step``, after a run that loads what it needs."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def samples_us(runs: Mapping[str, Step], n_samples: int = N_SAMPLES) -> dict[str, list[float]]:
    """Times of each run, taken in turns, each after the L2 was filled with something else."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_samples):
        events = {}
        for name, run in runs.items():
            flush.zero_()  # also keeps the device busy until the replay is queued
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            events[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            times[name].append(1e3 * start.elapsed_time(stop))
    return times


def host_us(step: Step) -> float:
    """Median time of the call alone: what Python and the launches cost where no graph is replayed."""
    times = []
    for _ in range(N_HOST_CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return round(statistics.median(times), 1)


def summary(times: list[float]) -> dict[str, float]:
    """Median and deciles."""
    deciles = statistics.quantiles(times, n=10)
    spread = dict(p10_us=round(deciles[0], 2), p90_us=round(deciles[-1], 2))
    return {"median_us": round(statistics.median(times), 2), **spread}


def kernels_us(step: Step) -> dict[str, float]:
    """Microseconds of each kernel of a step, warm, by the profiler; empty where it sees no kernels."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(N_SAMPLES):
            step()
        torch.cuda.synchronize()
    kernels = (event for event in profile.key_averages() if event.key.endswith("_kernel"))
    return {event.key: round(event.self_device_time_total / event.count, 2) for event in kernels}


def copy_record() -> dict[str, Any]:
    """Bytes read and written by a large copy, per second: a third of the free memory, if it is little."""
    n_bytes = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 3)
    source, target = torch.empty(2, n_bytes, dtype=torch.uint8, device="cuda")
    times = samples_us({"copy": lambda: target.copy_(source)})["copy"]
    rate = round(2 * n_bytes / statistics.median(times) / 1e3, 1)
    return {"method": "copy", **summary(times), "bytes_moved": 2 * n_bytes, "gb_per_s": rate}
