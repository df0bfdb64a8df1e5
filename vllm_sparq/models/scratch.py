"""A folder that is made beside its place and put there whole, though several processes may make it at once."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

LOCK = "lock"
"""In a folder of `beside`: a file that its process holds a lock on for as long as it lives."""


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder in the same parent, this process's own until the block ends. What killed ones left goes first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.unfinished-"
    for other in folder.parent.iterdir():
        if other.name.startswith(prefix) and _is_left(other):
            shutil.rmtree(other, ignore_errors=True)
    mine = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with (mine / "new").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: nobody takes ours for left there
                fcntl.flock(lock, fcntl.LOCK_EX)
            (mine / "new").rename(mine / LOCK)  # under its name only now, so that nobody finds it free
            yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether its process is gone, so that its lock can be had."""
    try:
        with (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def put(made: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    """Give a folder of `beside` its place. One that is whole and there already stays: it may be in use.

    Args:
        made: the folder; nothing else in its parent is called "broken".
        folder: its place.
        is_whole: whether what is there is as good as ours. What is not makes room.
    """
    try:
        made.rename(folder)
    except OSError:  # something is there
        if is_whole(folder):
            return
        folder.rename(made.with_name("broken"))
        made.rename(folder)
