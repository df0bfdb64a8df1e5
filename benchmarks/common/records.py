"""A measurement is one JSON line that says what was measured, where, and with which code.

Lines are only ever added to a file. Each holds a key made of the case that was measured and of the machine, so that the
same command run again finds what it has measured already and skips it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.lines import append_lines, read_lines
from vllm_sparq.console import UsageError

SCHEMA = 2
"""Version of the lines. It grows when the meaning of a field or of a key changes, not when a field is added.

1: a key did not hold how the cache is cut, so that two block sizes were one case.
2: key and line hold `block_size`, `kv_bytes_per_token` and the instruction set.
"""

READABLE = (1, SCHEMA)
"""Versions whose lines mean the same to a reader; a key of version 1 is that of no case of today."""


VERSIONS = ("torch", "vllm", "vllm-sparq")
"""Packages whose versions two results must share for one to count as the other."""

ORIGIN = ("commit", "dirty", "changes", "cpu", "cores", "isa", "gpu", *VERSIONS)
"""What of their provenance two results must share to be set beside each other, or in each other's place."""

NOT_CODE = (":(exclude)*.jsonl", ":(exclude)*.md")
"""Paths whose changes make no other code: results that are being written, and texts."""


def provenance() -> dict[str, Any]:
    """What a reader needs to judge a figure: commit, whether the tree was clean, versions, device."""
    return {
        **code(),
        **device(),
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that a result depends on; None for one that is not installed."""
    return {package: _version(package) for package in VERSIONS}


def code() -> dict[str, Any]:
    """Commit, whether the tree was clean, and of one that was not a digest of its ``changes``.

    None for what a copy without its history cannot know: git may answer for a project that merely holds the copy, such
    as one with a virtual environment in it, so it is asked first whether it keeps this file.
    """
    here = Path(__file__).resolve()
    if _git("ls-files", "--error-unmatch", here.name) is None:
        return {"commit": None, "dirty": None}
    status = _git("status", "--porcelain", "--untracked-files=no")
    found = {"commit": _git("rev-parse", "--short=12", "HEAD"), "dirty": None if status is None else bool(status)}
    return {**found, "changes": _changes(here.parents[2])} if status else found


def device() -> dict[str, Any]:
    """The machine: processor, cores that we may use, the instruction set of our kernels, accelerator if there is one.

    Raises:
        UsageError: our kernels cannot be used as they are, or as the environment asks for them.
    """
    import torch

    from vllm_sparq.ops import instruction_sets, native

    try:
        isa = native.find().isa
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    found: dict[str, Any] = {"cpu": instruction_sets.cpu_name(), "cores": len(os.sched_getaffinity(0)), "isa": isa}
    return {**found, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else found


def case_key(bench: str, case: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that are the same for the same case on the same kind of machine.

    Args:
        bench: name of the measurement.
        case: what was measured, in values that JSON can hold.
    """
    text = json.dumps({"bench": bench, "case": dict(case), "device": device()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file, stamped with `SCHEMA`; never rewrites what is there.

    Raises:
        UsageError: the file holds lines of another schema, or cannot be written.
    """
    for where, first in islice(read_lines(path), 1):
        check_schema(first, where)
    append_lines(path, [{"schema": SCHEMA, **record} for record in records])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, or of all ``*.jsonl`` files below a folder in the order of their names; none if absent.

    A line without ``schema`` is of the first schema, which did not say so.

    Raises:
        UsageError: a line is not a JSON object, or is of another schema.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    records = []
    for where, record in (line for file in files for line in read_lines(file)):
        check_schema(record, where)
        records.append(record)
    return records


def recorded(path: Path | None, keys: Iterable[str], *, again: bool = False) -> dict[str, dict[str, Any]]:
    """Key -> newest line of the file with that key. Nothing if there is no file, or to measure ``again``.

    A line of other versions of vLLM, torch or this package is another result, whatever its key is.
    """
    if path is None or again:
        return {}
    wanted, installed = set(keys), versions()
    return {
        record["key"]: record
        for record in read_records(path)
        if record.get("key") in wanted and installed.items() <= record.items()
    }


def origin_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Code and machine of a line, or of `provenance`: what is measured is another result where these differ."""
    return {name: record.get(name) for name in ORIGIN}


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether a ratio of two lines says something: the same code on the same machine with the same instructions."""
    return origin_of(a) == origin_of(b)


def dense_beside(
    record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], case: Sequence[str] = ("bench", "task", "length")
) -> Mapping[str, Any] | None:
    """The newest line of dense, of the same ``case``, code and machine as a record; None if there is none."""
    alike = [other for other in records if other.get("method") == "dense" and comparable(other, record)]
    same = [other for other in alike if all(other.get(name) == record.get(name) for name in case)]
    return same[-1] if same else None


def skipped_note(records: Iterable[Mapping[str, Any]]) -> str:
    """What to tell a user whose cases are on record."""
    commits = sorted({_commit_of(record) for record in records})
    return f"on record already (commit {', '.join(commits)}), not measured again; --again measures anew"


def check_schema(record: Mapping[str, Any], where: str) -> None:
    """Refuse lines that mean something else than this version takes them for.

    Raises:
        UsageError: the line at ``where`` is of such a schema.
    """
    schema = record.get("schema", 1)
    if schema not in READABLE:
        raise UsageError(
            f"{where} is a result of schema {schema}, and this version reads schemas {READABLE[0]} to {SCHEMA}: "
            "use another file or folder, or the version of vllm-sparq that wrote it"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit_of(record: Mapping[str, Any]) -> str:
    return f"{record.get('commit')}{' with changes' if record.get('dirty') else ''}"


def _changes(root: Path) -> str:
    """Sixteen hexadecimal digits of what the code below a folder has beside its commit, new files included."""
    found = hashlib.sha256((_git("diff", "HEAD", "--binary", "--", ".", *NOT_CODE, folder=root) or "").encode())
    listed = _git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.h", "*.cpp", folder=root)
    for name in sorted(filter(None, (listed or "").split("\0"))):
        found.update(name.encode())
        found.update((root / name).read_bytes())
    return found.hexdigest()[:16]


def _git(*arguments: str, folder: Path | None = None) -> str | None:
    """Output of a git command, in the folder of this file unless told; None outside a checkout, or without git."""
    command = ["git", "-C", str(folder or Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
