"""All kernels compiled before the first is launched, in parallel, and the reference's answers beside it.

Nothing here touches the GPU. A process of the pool runs a cell on tensors without memory, on the "meta" device, with a
driver that only names the target: every launch passes through Triton's own launcher up to the compiled kernel, which
goes to Triton's cache on disk, where the process that has the GPU finds it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FuturesTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sparq.benchmarks.gpu import layer
from vllm_sparq.benchmarks.gpu.cells import Cell
from vllm_sparq.benchmarks.gpu.checks import expected, launch_checks
from vllm_sparq.benchmarks.gpu.worker import file_name

HEAVY = ("score_kernel", "prefill_kernel", "attend_kernel")
"""Kernels that take longest to compile: first, so that no process ends with one of them alone."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is compiled for."""

    capability: int
    multiprocessors: int


class NamedDriver:
    """Stands in for Triton's driver where there is no device: names the target, and launches nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Done(Exception):
    """The launch that was wanted is compiled; those after it are not."""


def set_up(target: Target) -> None:
    """In a process of the pool, before its first job."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from vllm_sparq.ops.triton_common import launch

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NamedDriver(target.capability))
    launch.INTERPRETED_SMS = target.multiprocessors  # of a device that is not CUDA, as "meta"


@contextmanager
def launches(note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Launches of Triton's are noted in here, and not done."""
    from triton.runtime import jit

    run = jit.JITFunction.run
    jit.JITFunction.run = lambda kernel, *args, grid, warmup, **named: note(kernel, args, named)
    try:
        yield
    finally:
        jit.JITFunction.run = run


def key_of(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[str, str]:
    """Name, and what Triton looks compiled code up with."""
    from triton.runtime import driver, jit

    binder = kernel.device_caches[driver.active.get_current_device()][4]
    _, specialization, options = binder(*args, **named, debug=False)
    return kernel.__name__, jit.compute_cache_key({}, specialization, options)


def dry_run(cell: Cell) -> None:
    """Every launch of a cell, on tensors without memory."""
    if cell.kind in ("check", "graph"):
        launch_checks(cell.case, "meta")
    else:
        layer.launch(cell, "meta")


def keys_of(cell: Cell) -> list[tuple[str, str]]:
    """The key of every launch of a cell, in order."""
    found: list[tuple[str, str]] = []
    with launches(lambda *launch: found.append(key_of(*launch))):
        dry_run(cell)
    return found


def keys_or_why(cell: Cell) -> list[tuple[str, str]] | str:
    """`keys_of`, or why there are none: then the cell's kernels are compiled where they are launched."""
    try:
        return keys_of(cell)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000]


def compile_launch(cell: Cell, index: int) -> dict[str, Any]:
    """Compile the launch of a cell that comes at ``index``; what it took, and what the kernel takes."""
    from triton.runtime import jit

    n_before, found = 0, dict[str, Any]()
    run = jit.JITFunction.run

    def note(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal n_before
        if n_before == index:
            begin = time.monotonic()
            binary = run(kernel, *args, grid=(1,), warmup=True, **named)
            found.update(kernel=kernel.__name__, compile_s=round(time.monotonic() - begin, 2))
            found.update(shared_bytes=binary.metadata.shared)
            raise Done
        n_before += 1

    with launches(note):
        try:
            dry_run(cell)
        except Done:
            return found
    raise RuntimeError(f"{cell.name} has {n_before} launches, and number {index} was to be compiled")


def answer(cell: Cell, folder: Path) -> None:
    """What the reference answers, to a file that appears whole."""
    path = folder / file_name(cell)
    torch.save(expected(cell.case), path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def prepare(
    cells: Sequence[Cell],
    target: Target,
    folder: Path,
    *,
    processes: int,
    seconds: float,
    say: Callable[[str], None],
    references: bool = True,
) -> Iterator[dict[str, Any]]:
    """Compile what the cells launch, each kernel once; a record each, as they come, then one of all.

    Args:
        folder: for what the reference answers.
        processes: of the pool.
        seconds: no longer than this: what is left is compiled where it is launched.
        say: called with a line of progress.
        references: whether to compute what the reference answers.
    """
    begin, found = time.monotonic(), 0
    pool = _pool(target, processes)
    try:
        ours = [cell for cell in cells if cell.launches_ours]
        keys = dict(zip(ours, pool.map(keys_or_why, ours, timeout=seconds), strict=True))
        yield from ({"cell": cell.name, "error": why} for cell, why in keys.items() if isinstance(why, str))
        futures: dict[Future[Any], Cell] = {pool.submit(compile_launch, cell, i): cell for cell, i in _jobs(keys)}
        if references:
            futures |= {pool.submit(answer, cell, folder): cell for cell in cells if cell.kind == "check"}
        for future in as_completed(futures, timeout=max(0.1, seconds - (time.monotonic() - begin))):
            found += 1
            say(f"compiled and answered by the reference: {found} of {len(futures)}")
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise error
            if error is not None:
                yield {"cell": futures[future].name, "error": f"{type(error).__name__}: {error}"[:1000]}
            elif future.result() is not None:
                yield {"cell": futures[future].name, **future.result()}
        why = None
    except (FuturesTimeout, BrokenProcessPool) as error:
        why = f"{type(error).__name__} after {found} jobs: the rest is compiled when it is launched"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    total = {"cell": "all", "jobs": found, "processes": processes, "compile_s": round(time.monotonic() - begin, 1)}
    yield total if why is None else {**total, "error": why}


def _jobs(keys: Mapping[Cell, list[tuple[str, str]] | str]) -> list[tuple[Cell, int]]:
    """(cell, number of its launch) for every key, once."""
    first: dict[tuple[str, str], tuple[Cell, int]] = {}
    for cell, found in keys.items():
        for i, key in enumerate(found if isinstance(found, list) else ()):
            first.setdefault(key, (cell, i))
    return [place for key, place in sorted(first.items(), key=lambda one: one[0][0] not in HEAVY)]


def _pool(target: Target, processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=set_up, initargs=(target,))
