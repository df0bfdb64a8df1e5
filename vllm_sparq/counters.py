"""Counts that the scheduler's process keeps and a front end publishes, by way of a small file.

vLLM sends the statistics of its scheduler to the front end, but in a type of its own that has no room for ours. So both
must live on one machine: under data parallelism over several nodes, what is counted on another host than the front
end's is never found, and not published. On one machine they find the file by a name that both know:

* one front end: the engine's ``instance_id``, which travels with the configuration.
* several (`vllm serve --data-parallel-size 2`, or ``--api-server-count``): each makes a configuration anew, and with it
  another id. They are children of one process, as the engines are, and inherit from it the environment variable `RUN`.

Several front ends read the counts of each engine, and Prometheus adds up what they publish. So a count is not read, it
is *taken*: whoever comes first publishes it, and nobody else does.

Front ends read while the scheduler writes, without a lock that could hold up a step. So each count is written by one
store of 8 aligned bytes, which is whole or absent on x86 and Arm: a front end finds what was there before or after.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("blocks_taken", "preemptions_avoided", "dense_requests", "tuned_requests")
N_BYTES = 2 * len(NAMES) * 8  # of the file, in whole numbers: what was counted, and what of it was taken

RUN = "VLLM_SPARQ_RUN"
"""Environment variable: names one `vllm serve` with several front ends. Set in the parent of all its processes."""


def name_run(vllm_config: Any) -> None:
    """Let the processes that this one starts know each other's counters, where they need it."""
    if vllm_config.parallel_config._api_process_count > 1:
        os.environ.setdefault(RUN, uuid.uuid4().hex)


class Counters:
    """One writer; any number of processes that take what it counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers: memoryview | None = None
        self._lock: int | None = None

    @classmethod
    def of(cls, vllm_config: Any, engine_index: int) -> Counters:
        """Those of one engine core."""
        run = vllm_config.instance_id.removesuffix(
            f"_dp{engine_index}"
        )  # by which Ray tells apart the engines it starts
        if vllm_config.parallel_config._api_process_count > 1:
            run = os.environ.get(RUN, run)
        return cls(Path(tempfile.gettempdir()) / f"vllm-sparq-{run}-{engine_index}.counters")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Counts exist from here on, from zero, until the block is left."""
        begun = self.path.with_suffix(".begun")  # front ends look at any moment, and find all of it or nothing
        begun.write_bytes(bytes(N_BYTES))
        begun.replace(self.path)
        self._open()
        try:
            yield
        finally:
            self._close()
            self.path.unlink(missing_ok=True)

    @property
    def is_open(self) -> bool:
        """Whether the file is there and mapped."""
        return self._numbers is not None

    def write(self, **counts: int) -> None:
        """Set counts, by name. They only grow."""
        assert self._numbers is not None
        for name, count in counts.items():
            self._numbers[NAMES.index(name)] = count

    def take(self) -> dict[str, int]:
        """By name, what was counted and not taken yet; empty where nobody counts (yet)."""
        if self._numbers is None and not self._open():
            return {}
        assert self._numbers is not None
        assert self._lock is not None
        if not any(self._not_taken(self._numbers)):
            return {}
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            found = self._not_taken(self._numbers)
            for i, count in enumerate(found, len(NAMES)):
                self._numbers[i] += count
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return dict(zip(NAMES, found, strict=True))

    @staticmethod
    def _not_taken(numbers: memoryview) -> list[int]:
        """Never below zero: what was taken is published, and cannot be taken back."""
        counted, taken = numbers[: len(NAMES)].tolist(), numbers[len(NAMES) :].tolist()
        return [max(new - old, 0) for new, old in zip(counted, taken, strict=True)]

    def _open(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self._lock = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            # Not struct.pack_into: it fills its bytes with zeros first, and then writes one after the other.
            self._numbers = memoryview(mmap.mmap(self._lock, N_BYTES, access=mmap.ACCESS_WRITE)).cast("q")
        return self._numbers is not None

    def _close(self) -> None:
        if self._numbers is not None and self._lock is not None:
            self._numbers.release()  # and with the last view of it the mapping goes
            os.close(self._lock)
        self._numbers = self._lock = None
