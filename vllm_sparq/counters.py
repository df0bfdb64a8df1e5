"""Counts that the scheduler's process keeps and the front end reads, by way of a small file.

vLLM sends the statistics of its scheduler to the front end, but in a type of its own that has no room for ours. Both
processes know the engine's ``instance_id``, and live on one machine.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("blocks_taken", "preemptions_avoided")
FORMAT = struct.Struct(f"<{len(NAMES)}q")


class Counters:
    """One writer, any number of readers; a reader may see one count a moment before the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None

    @classmethod
    def of(cls, vllm_config: Any, engine_index: int) -> Counters:
        """Those of one engine core."""
        return cls(Path(tempfile.gettempdir()) / f"vllm-sparq-{vllm_config.instance_id}-{engine_index}.counters")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Counts exist from here on, from zero, until the block is left."""
        self.path.write_bytes(FORMAT.pack(*[0] * len(NAMES)))
        self._open(mmap.ACCESS_WRITE)
        try:
            yield
        finally:
            self._map = None
            self.path.unlink(missing_ok=True)

    def write(self, **counts: int) -> None:
        """Set all counts, by name."""
        assert self._map is not None
        FORMAT.pack_into(self._map, 0, *(counts[name] for name in NAMES))

    def read(self) -> dict[str, int]:
        """The counts by name; empty where nobody counts (yet)."""
        if self._map is None and not self._open(mmap.ACCESS_READ):
            return {}
        assert self._map is not None
        return dict(zip(NAMES, FORMAT.unpack_from(self._map, 0), strict=True))

    def _open(self, access: int) -> bool:
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), FORMAT.size, access=access)
        return self._map is not None
