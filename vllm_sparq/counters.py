"""Counts that the scheduler's process keeps and a front end publishes, by way of a small file.

vLLM sends the statistics of its scheduler to the front end, but in a type of its own that has no room for ours. Both
processes live on one machine. They find the file by a name that both know:

* one front end: the engine's ``instance_id``, which travels with the configuration.
* several (`vllm serve --data-parallel-size 2`, or ``--api-server-count``): each makes a configuration anew, and with it
  another id. They are children of one process, as the engines are, and inherit from it the environment variable `RUN`.

Several front ends read the counts of each engine, and Prometheus adds up what they publish. So a count is not read, it
is *taken*: whoever comes first publishes it, and nobody else does.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("blocks_taken", "preemptions_avoided", "dense_requests", "tuned_requests")
FORMAT = struct.Struct(f"<{len(NAMES)}q")  # twice in the file: what was counted, and what of it was taken

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
        self._map: mmap.mmap | None = None
        self._lock: int | None = None
        self._counted = dict.fromkeys(NAMES, 0)

    @classmethod
    def of(cls, vllm_config: Any, engine_index: int) -> Counters:
        """Those of one engine core."""
        run = vllm_config.instance_id
        if vllm_config.parallel_config._api_process_count > 1:
            run = os.environ.get(RUN, run)
        return cls(Path(tempfile.gettempdir()) / f"vllm-sparq-{run}-{engine_index}.counters")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Counts exist from here on, from zero, until the block is left."""
        begun = self.path.with_suffix(".begun")  # front ends look at any moment, and find all of it or nothing
        begun.write_bytes(bytes(2 * FORMAT.size))
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
        return self._map is not None

    def write(self, **counts: int) -> None:
        """Set counts, by name. They only grow."""
        assert self._map is not None
        self._counted |= counts
        FORMAT.pack_into(self._map, 0, *(self._counted[name] for name in NAMES))

    def take(self) -> dict[str, int]:
        """By name, what was counted and not taken yet; empty where nobody counts (yet)."""
        if self._map is None and not self._open():
            return {}
        assert self._map is not None
        assert self._lock is not None
        if self._map[: FORMAT.size] == self._map[FORMAT.size :]:
            return {}
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            counted, taken = FORMAT.unpack_from(self._map, 0), FORMAT.unpack_from(self._map, FORMAT.size)
            FORMAT.pack_into(self._map, FORMAT.size, *counted)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return {name: new - old for name, new, old in zip(NAMES, counted, taken, strict=True)}

    def _open(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            self._lock = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            self._map = mmap.mmap(self._lock, 2 * FORMAT.size, access=mmap.ACCESS_WRITE)
        return self._map is not None

    def _close(self) -> None:
        if self._map is not None and self._lock is not None:
            self._map.close()
            os.close(self._lock)
        self._map = self._lock = None
