"""A session on a GPU that may end, fail or stall at any time: the most telling first, and on record what was measured.

One process has the GPU. Records go to the disk after each job, not at the end. A job that kills the process, or does
not come back, becomes a record with the last lines that the process said, and the next job gets a new one. No job
begins that would not end in time, by what jobs were guessed to take and have taken; those left out are recorded too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllm_sparq.benchmarks.common.engine_process import EngineProcess, WorkerGoneError
from vllm_sparq.benchmarks.common.records import append_records, code, read_records

Record = dict[str, Any]

SLACK = 5.0
"""Times its guess, or `LEAST_PATIENCE`, if that is more: how long a job may take before it counts as stalled."""

LEAST_PATIENCE = 60.0

MOST_STARTS_FAILED = 2
"""In a row; then there is no GPU to be had."""

LEFT_OUT = "left_out"

NO_ROOM = "no_room"
"""Key of what says that a device has no room for a job; beside it, the memory that the job ``needed_gib``."""


class Job(Protocol):
    """What takes ``seconds`` by a guess, and is recorded under its name."""

    @property
    def name(self) -> str: ...

    @property
    def seconds(self) -> float: ...


@dataclass
class Budget:
    """Seconds that may be spent, and how they are being spent.

    Attributes:
        seconds: of all.
        clock: seconds since some moment.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    guessed: float = 0.0
    spent: float = 0.0

    def __post_init__(self) -> None:
        self._begin = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self._begin)

    @property
    def pace(self) -> float:
        """How many times its guess a job has taken; guesses are not trusted to be too long by much."""
        return max(0.5, self.spent / self.guessed) if self.guessed else 1.0

    def why_not(self, job: Job) -> str | None:
        """Why a job would not end in time, if so."""
        wanted = job.seconds * self.pace
        if wanted <= self.left:
            return None
        return f"wants about {wanted:.0f} s, and {max(0.0, self.left):.0f} s are left"

    def patience(self, job: Job) -> float:
        """How long a job may take."""
        return min(self.left, max(LEAST_PATIENCE, SLACK * job.seconds * self.pace))

    @contextlib.contextmanager
    def spend(self, job: Job) -> Iterator[None]:
        """Note what a job takes."""
        begin = self.clock()
        yield
        self.guessed += job.seconds
        self.spent += self.clock() - begin


@dataclass
class Output:
    """Where records go: to a file, at once, with what is the same for all of them.

    Attributes:
        path: of the file; None to keep none.
        about: the code and the machine.
    """

    path: Path | None
    about: Record
    records: list[Record] = field(default_factory=list)

    def add(self, records: Iterable[Record]) -> list[Record]:
        """They are on the disk when this returns."""
        new = [{**record, **self.about} for record in records]
        if self.path is not None:
            append_records(self.path, new)
        self.records += new
        return new


def code_of(commit: str | None) -> Record:
    """What lines say of the code: as a user says it of a copy that has no history, else as git does."""
    known = code()
    return {"commit": commit, "dirty": False} if commit and known["commit"] is None else known


def done_before(paths: Sequence[Path], bench: str, about: Record) -> set[str]:
    """Names of the jobs whose last line in these files is a result, by this code on this GPU."""
    lines = [record for path in paths for record in read_records(path) if record.get("bench") == bench]
    same = [line for line in lines if all(line.get(name) == about.get(name) for name in ("commit", "dirty", "gpu"))]
    last = {str(line["name"]): line for line in same}
    return {name for name, line in last.items() if is_done(line, about)}


def is_done(line: Record, about: Record) -> bool:
    """Whether another try could say no more: not where a job failed or was left out, nor where there is room by now.

    GPUs of one name come with more memory and less, so that one may have room for what another has not.
    """
    if isinstance(line.get("error"), str) or LEFT_OUT in line:
        return False
    needed, total = line.get("needed_gib"), about.get("gpu_gib")
    return NO_ROOM not in line or needed is None or total is None or needed >= total


class Hand:
    """The process that has the GPU, started again when it is gone.

    Args:
        make: a process that has not been started.
    """

    def __init__(self, make: Callable[[], EngineProcess]) -> None:
        self.make = make
        self.process: EngineProcess | None = None
        self.n_failed = 0

    def ask(self, order: str, *arguments: Any, within: float) -> Any:
        """What the worker answers; a process that did not is gone afterwards.

        Raises:
            WorkerGoneError: it could not be started, ended, failed, or took too long.
        """
        begin = time.monotonic()
        try:
            if self.process is None:
                process = self.make()
                self.n_failed += 1
                process.start(within)
                self.process, self.n_failed = process, 0
            return self.process.ask(order, *arguments, within=within - (time.monotonic() - begin))
        except WorkerGoneError:
            self.kill()
            raise

    @property
    def is_hopeless(self) -> bool:
        """Whether starting it keeps failing."""
        return self.n_failed >= MOST_STARTS_FAILED

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process = None


def measure(
    jobs: Iterable[Job],
    ask: Callable[[Job, float], Iterable[Record]],
    budget: Budget,
    output: Output,
    bench: str,
    say: Callable[[Job, Record], None],
    is_hopeless: Callable[[], bool] = lambda: False,
) -> None:
    """Each job in turn, as long as there is time.

    Args:
        jobs: what is worth most first.
        ask: gives the records of a job, within so many seconds; each is on the disk before the next is asked for.
        bench: kind of the records.
        say: called with a job and each of its records when that is on the disk.
        is_hopeless: whether to leave out whatever comes.
    """

    def keep(job: Job, record: Record) -> None:
        for line in output.add([{"bench": bench, "name": job.name, **record}]):
            say(job, line)

    for job in jobs:
        why = "the process that has the GPU does not start" if is_hopeless() else budget.why_not(job)
        if why is not None:
            keep(job, {LEFT_OUT: why})
            continue
        with budget.spend(job):
            try:
                for record in ask(job, budget.patience(job)):
                    keep(job, record)
            except WorkerGoneError as error:
                keep(job, {"error": str(error), "said": error.said})
