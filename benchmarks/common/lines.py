"""Files of JSON lines that several runs may add to, and that a killed run or a full disk cannot break.

Lines are added whole, under a lock, and are on the disk when the call returns. What a killed writer left half-written
is only ever the last line: readers pass over it, and the next writer cuts it off; both say so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_sparq.console import UsageError

Line = dict[str, Any]

N_TAIL_BYTES = 1 << 16
"""Bytes that are read at a time to find where the last whole line ends."""


def check_out(path: Path | None, option: str = "--out") -> None:
    """Refuse a file that lines cannot be added to: the first thing that a command does. Leaves nothing behind.

    Raises:
        UsageError: it is no regular file, or the system does not let us write there.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        try:
            _try_nearest(path.parent)
        except OSError as error:
            raise _not_writable(path, option, error) from None
        return
    existed = path.exists()
    with _locked(path, option):
        pass
    if not existed:
        path.unlink(missing_ok=True)


def check_folder(folder: Path | None, option: str = "--out", files: Iterable[str] = ()) -> None:
    """The same of a folder, and of files in it that lines are added to.

    Raises:
        UsageError: it, or one of the files, cannot be made or written.
    """
    if folder is None:
        return
    try:
        _try_nearest(folder)
    except OSError as error:
        raise _not_usable(folder, option, error) from None
    for path in (folder / name for name in files):
        if os.path.lexists(path):
            check_out(path, option)


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make it if it is absent.

    Raises:
        UsageError: it cannot be made, or not written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_nearest(folder)
    except OSError as error:
        raise _not_usable(folder, option, error) from None


def _try_nearest(folder: Path) -> None:
    """Write a file without a name into it, or into what it would be made in."""
    nearest = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    with tempfile.TemporaryFile(dir=nearest):
        pass


def _not_usable(folder: Path, option: str, error: OSError) -> UsageError:
    is_file = isinstance(error, (FileExistsError, NotADirectoryError)) and os.path.lexists(folder)
    reason = "it is a file" if is_file else _reason(error)
    return UsageError(f"{option} {folder} cannot be used ({reason}): give a folder that can be written")


def _not_writable(path: Path, option: str, error: OSError) -> UsageError:
    return UsageError(f"{option} {path} cannot be written ({_reason(error)}): give a file in a folder that can")


def _reason(error: OSError) -> str | None:
    above = isinstance(error, (FileExistsError, NotADirectoryError))
    return "a folder above it is a file" if above else error.strerror


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines, all or none of them; the file and its folders are made where they are missing.

    Raises:
        UsageError: they cannot be written.
    """
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    with _locked(path) as file:
        end = _mend(path, file)
        try:
            _write(file, text)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise UsageError(f"{path}: {error.strerror}; nothing was added: give another --out") from None


def replace_lines(path: Path, merged: Callable[[list[Line]], Iterable[Mapping[str, Any]]]) -> None:
    """Put what ``merged`` makes of the lines in their place; a reader sees the old file or the new one.

    Raises:
        UsageError: a line is broken, or the file cannot be written.
    """
    with _locked(path) as file:
        _mend(path, file)
        records = merged([line for _, line in read_lines(path)])
        replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


def replace_text(path: Path, text: str) -> None:
    """Write a file under another name, flush it to the disk and give it its name.

    Raises:
        UsageError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(file, text.encode())
        finally:
            os.close(file)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written ({error.strerror}): give another place") from None


def mend(path: Path) -> None:
    """Cut off a half-written last line of a file of lines, if there is one.

    Raises:
        UsageError: the file cannot be written.
    """
    if path.exists():
        with _locked(path) as file:
            _mend(path, file)


def read_lines(path: Path) -> Iterator[tuple[str, Line]]:
    """Each record of a file with where it stands, as "file:number"; none if there is no file.

    A last line without its end is passed over unless it is whole: its writer was killed, or is writing it now.

    Raises:
        UsageError: the file cannot be read, or a line is not a JSON object.
    """
    if not path.exists():
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    *lines, last = data.split(b"\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        record = _parsed(text)
        if record is None:
            raise UsageError(f"{where} is not a JSON object: repair or remove that line, or give another file")
        yield where, record
    if last.strip():
        record = _parsed(last)
        if record is None:
            _say(f"{path}: passed over the half-written last line, {_shown(last)}")
        else:
            yield f"{path}:{len(lines) + 1}", record


@contextlib.contextmanager
def _locked(path: Path, option: str = "--out") -> Iterator[int]:
    """The file, open to be read and written, while no other of our processes writes it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _not_writable(path, option, error) from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UsageError(f"{option} {path} is no file that lines can be added to: give another one")
            fcntl.flock(file, fcntl.LOCK_EX)
            if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
                continue  # another process put a new file in its place while we waited
            yield file
            return
        finally:
            os.close(file)


def _mend(path: Path, file: int) -> int:
    """Make the file end with a whole line; where it ends then."""
    size = end = os.fstat(file).st_size
    tail = b""
    while end > 0:
        begin = max(0, end - N_TAIL_BYTES)
        tail = os.pread(file, end - begin, begin) + tail
        end = begin
        if b"\n" in tail:
            end += tail.rindex(b"\n") + 1
            break
    torn = tail[len(tail) - (size - end) :] if size > end else b""
    if torn and _parsed(torn) is not None:  # all but its end was written
        os.pwrite(file, b"\n", size)
        return size + 1
    if torn:
        _say(f"{path}: cut off the half-written last line, {_shown(torn)}")
        os.ftruncate(file, end)
    return end


def _write(file: int, text: bytes) -> None:
    """At the end, and on the disk."""
    os.lseek(file, 0, os.SEEK_END)
    while text:
        text = text[os.write(file, text) :]
    os.fsync(file)


def _parsed(text: bytes) -> Line | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # not text, not JSON
        return None
    return record if isinstance(record, dict) else None


def _shown(text: bytes) -> str:
    start = text[:40].decode(errors="replace")
    return f"{len(text):,} bytes that begin with {start!r}"


def _say(note: str) -> None:
    print(note, file=sys.stderr)
