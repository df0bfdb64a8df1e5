"""`vllm-sparq bench ops --beside DIR`: our ops by two builds of the kernels, in turns over the same pages.

Between two processes a shared machine differs by a tenth; between neighbouring calls of one, by little.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from vllm_sparq.benchmarks.ops.cell import Call
from vllm_sparq.benchmarks.ops.stopwatch import Stopwatch, microseconds, spread
from vllm_sparq.console import UsageError
from vllm_sparq.ops import native
from vllm_sparq.ops.dispatch import choose


@dataclass(frozen=True)
class Pair:
    """One method in one cell, round by round.

    Attributes:
        where: the cell, in words.
        method: its name.
        this, other: microseconds of the build that is in use, and of the one beside it.
    """

    where: str
    method: str
    this: Sequence[float]
    other: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """How many times faster this build was, ascending."""
        return sorted(other / this for this, other in zip(self.this, self.other, strict=True))


def library_in(folder: Path) -> Path:
    """The library of another build that takes the place of the one in use.

    Raises:
        UsageError: no compiled kernels are in use, or that build lacks theirs, or has another interface.
    """
    chosen, library = choose("dense_decode", "cpu"), native.find().library
    if chosen.implementation != "cpu" or library is None:
        raise UsageError(f"--beside {folder} compares compiled kernels, and none are in use: {chosen.reason}")
    path = (folder / library.name).resolve()
    if not path.is_file():
        raise UsageError(
            f"--beside {folder} holds no {path.name}, the kernels that run here: give the vllm_sparq/lib of another "
            "build, or a copy of it"
        )
    try:
        native.check_abi(path)
    except OSError as error:
        raise UsageError(f"--beside {folder}: {error}") from None
    return path


def measure(
    where: str, calls: dict[str, Call], other: Path, repeats: int, watch: Stopwatch, tick: Callable[[], None]
) -> list[Pair]:
    """Every call by both builds in each round; which goes first alternates, since the second finds warmer tables."""
    samples: dict[str, dict[Path | None, list[float]]] = {name: {None: [], other: []} for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            for build in (None, other) if i % 2 == 0 else (other, None):
                with native.another_build(build) if build is not None else nullcontext():
                    samples[name][build].append(watch.sample(call))
        tick()
    return [Pair(where, name, by_build[None], by_build[other]) for name, by_build in samples.items()]


def table(pairs: Sequence[Pair], folder: Path, watch: Stopwatch) -> Table:
    view = Table(box=box.SIMPLE_HEAD, title=f"this build beside {folder}, {watch.threads} threads, {watch.clock} time")
    for name in ("cell", "method", "µs", "beside", "faster", "p10 .. p90"):
        view.add_column(name, justify="left" if name in ("cell", "method") else "right", no_wrap=name != "cell")
    before = ""
    for pair in pairs:
        if before not in ("", pair.where):
            view.add_section()
        low, high = spread(pair.ratios)
        view.add_row(
            pair.where if pair.where != before else "",
            pair.method,
            microseconds(statistics.median(pair.this)),
            microseconds(statistics.median(pair.other)),
            f"{statistics.median(pair.ratios):.3f}x",
            f"{low:.2f} .. {high:.2f}",
        )
        before = pair.where
    return view
