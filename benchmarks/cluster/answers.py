"""Answers of an offline run, as Parquet shards in a folder: each row once, whatever is killed when.

A shard is written under another name, flushed to the disk and renamed, so a folder only ever holds whole shards, and
the ids in them are exactly the rows that are done. A run that is started again reads those ids and does the rest.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_sparq.benchmarks.common.lines import make_folder
from vllm_sparq.console import UsageError

SCHEMA = 2
"""Version of a folder: what its shards and its run.json mean.

1: a folder did not say with which settings and which code its rows were made.
2: its case holds them, and every row its origin.
"""

SHARD_ROWS = 1000
SHARD_SECONDS = 5.0
"""A shard is written when it is full or this old: what a kill loses, and what is then computed again."""


class Answers:
    """A folder of shards that one run at a time may add to; a context manager that writes the last shard on exit.

    Args:
        folder: made if it is absent.
        case: what is run, how and by which code, in values that JSON can hold. A folder with rows belongs to one case.

    Raises:
        UsageError: the folder holds another case, or another schema, or another run is writing to it.
    """

    def __init__(self, folder: Path, case: Mapping[str, Any]) -> None:
        self.folder = folder
        self._rows: list[Mapping[str, Any]] = []
        self._oldest = time.monotonic()
        make_folder(folder)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--out {folder}: another run is writing there; wait for it or give another folder"
            ) from None
        self._claim(json.loads(json.dumps(dict(case))))
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()
        self._found = self._origins()
        self._next = 1 + max((int(path.stem.removeprefix("part-")) for path in self.shards()), default=-1)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()
        self._lock.close()

    def shards(self) -> list[Path]:
        """Whole shards, in the order in which they were written."""
        return sorted(self.folder.glob("part-*.parquet"))

    def ids(self) -> set[str]:
        """Of all rows on disk."""
        from pyarrow import parquet

        return {id for shard in self.shards() for id in parquet.read_table(shard, columns=["id"])["id"].to_pylist()}

    def n_rows(self) -> int:
        """Of all shards, by what they say of themselves."""
        from pyarrow import parquet

        return sum(parquet.read_metadata(shard).num_rows for shard in self.shards())

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take rows that are done; they are on disk when their shard is.

        Raises:
            UsageError: another machine or other code made them than the rows that were found in the folder: a rate over
                both would be that of neither.
        """
        self._check_origins({row["origin"] for row in rows})
        if not self._rows:
            self._oldest = time.monotonic()
        self._rows.extend(rows)
        if len(self._rows) >= SHARD_ROWS or time.monotonic() - self._oldest > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken."""
        if not self._rows:
            return
        import pyarrow
        from pyarrow import parquet

        path = self.folder / f"part-{self._next:06d}.parquet"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            parquet.write_table(pyarrow.Table.from_pylist(self._rows, schema=arrow_schema()), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self._next += 1
        self._rows = []

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows on disk, shard by shard."""
        from pyarrow import parquet

        for shard in self.shards():
            yield from parquet.read_table(shard, columns=columns and list(columns)).to_pylist()

    def _origins(self) -> set[str]:
        from pyarrow import parquet

        tables = (parquet.read_table(shard, columns=["origin"]) for shard in self.shards())
        return {origin for table in tables for origin in table["origin"].unique().to_pylist()}

    def _check_origins(self, origins: set[str]) -> None:
        strange = origins - self._found
        if not self._found or not strange:
            return
        there, here = (json.loads(min(some)) for some in (self._found, strange))
        name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
        raise UsageError(
            f"--out {self.folder} holds rows that were made with {name} {there.get(name)!r}, and a replica now has "
            f"{here.get(name)!r}: rows of both have no common rate; give another folder"
        )

    def _claim(self, case: dict[str, Any]) -> None:
        """Say in the folder what it is for, or compare with what it says if it holds rows of that."""
        about = self.folder / "run.json"
        if not about.exists():
            if self.shards():
                raise UsageError(f"--out {self.folder}: it holds shards and no run.json; give another folder")
            self._name(about, case)
            return
        try:
            found = json.loads(about.read_text())
        except (OSError, ValueError, RecursionError):  # ValueError: not text, not JSON
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("case", {}), dict):
            raise UsageError(f"--out {self.folder}: its run.json cannot be read; give another folder")
        if found.get("schema") != SCHEMA:
            raise UsageError(
                f"--out {self.folder} was written with schema {found.get('schema')}, this version has {SCHEMA}: "
                "give another folder"
            )
        there = found.get("case", {})
        different = [name for name in {**case, **there} if there.get(name) != case.get(name)]
        if different and not self.shards():
            self._name(about, case)
        elif different:
            name = different[0]
            raise UsageError(
                f"--out {self.folder} holds a run with {name} {there.get(name)!r}, and this one has "
                f"{case.get(name)!r}: give another folder, or the same {name} to go on with that run"
            )

    def _name(self, about: Path, case: dict[str, Any]) -> None:
        temporary = about.with_suffix(".tmp")
        temporary.write_text(json.dumps({"schema": SCHEMA, "case": case}, indent=2) + "\n")
        temporary.rename(about)


def arrow_schema() -> Any:
    """Of a shard; times are seconds since the epoch, of the replica's clock, and ``origin`` is `replicas.origin`'s."""
    import pyarrow

    columns = {
        "id": pyarrow.string(),
        "text": pyarrow.string(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "n_prompt_tokens": pyarrow.int32(),
        "n_tokens": pyarrow.int32(),
        "started": pyarrow.float64(),
        "finished": pyarrow.float64(),
        "preemptions": pyarrow.int32(),
        "attention": pyarrow.string(),
        "origin": pyarrow.string(),
        "replica": pyarrow.string(),
    }
    return pyarrow.schema(list(columns.items()))
