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
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_sparq.console import UsageError

SCHEMA = 1
"""Version of the lines. It grows when the meaning of a field changes, not when a field is added."""


def provenance() -> dict[str, Any]:
    """What a reader needs to judge a figure: commit, whether the tree was clean, versions, device."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        **device(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "vllm", "vllm-sparq")},
    }


def device() -> dict[str, Any]:
    """The machine: its processor, the cores that we may use, and its accelerator if there is one."""
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0))}
    import torch

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
        UsageError: the file holds lines of another schema.
    """
    if path.exists():
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        if first.endswith("\n"):  # else a killed run left it unfinished, and it says nothing
            _parsed(first, f"{path}, line 1")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"schema": SCHEMA, **record}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, or of all ``*.jsonl`` files below a folder in the order of their names; none if absent.

    A line without ``schema`` is of the first schema, which did not say so.

    Raises:
        UsageError: a line is not a JSON object, or is of another schema.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    records = []
    for file in files:
        if not file.exists():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                records.append(_parsed(line, f"{file}, line {number}"))
    return records


def recorded(path: Path | None, keys: Iterable[str], *, again: bool = False) -> dict[str, dict[str, Any]]:
    """Key -> newest line of the file with that key. Nothing if there is no file, or to measure ``again``."""
    if path is None or again:
        return {}
    wanted = set(keys)
    return {record["key"]: record for record in read_records(path) if record.get("key") in wanted}


def skipped_note(records: Iterable[Mapping[str, Any]]) -> str:
    """What to tell a user whose cases are on record."""
    commits = sorted({str(record.get("commit")) for record in records})
    return f"on record already (commit {', '.join(commits)}), not measured again; --again measures anew"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON ({error}): remove the line") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where} is not a JSON object: remove the line")
    schema = record.get("schema", 1)
    if schema != SCHEMA:
        raise UsageError(
            f"{where} is a result of schema {schema}, and this version reads and writes schema {SCHEMA}: "
            "use another file or folder, or the version of vllm-sparq that wrote it"
        )
    return record


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the folder of this file; None outside a checkout."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
