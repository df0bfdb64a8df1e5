"""Child processes that never outlive us: each starts as a process group of its own and is stopped as a whole.

An engine of vLLM is a tree of processes that a plain kill of its root leaves running, on its port and on its cores.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

STOP_PATIENCE_S = 10.0
"""How long a group may take to end by itself before it is killed; vLLM needs about four seconds."""

# The kernel sends SIGTERM to the child when we are gone, however that came about (prctl 1 is PR_SET_PDEATHSIG).
_BOUND_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Stopped(KeyboardInterrupt):
    """A signal asked us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def raising_on_stop_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, once: later ones are ignored, so that nothing cuts the tidying short.

    For the main thread only.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """The command as one that ends with the process that starts it; its first word must be a path."""
    return [sys.executable, "-I", "-S", "-c", _BOUND_TO_PARENT, *command] if sys.platform == "linux" else [*command]


def start_group(
    command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `command` as a new process group, in `folder`, its output appended to `log`.

    Args:
        command: its first word must be a path.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            bound_to_parent(command),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop_group(process: subprocess.Popen[bytes], patience_s: float = STOP_PATIENCE_S) -> None:
    """End every process of the group that `process` leads: politely first, then not."""
    for number, seconds in ((signal.SIGTERM, patience_s), (signal.SIGKILL, STOP_PATIENCE_S)):
        if _has_ended(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(0.1)


def group_members(group: int) -> list[int]:
    """Ids of the living processes of a group. Zombies, which only wait to be collected, do not count."""
    import psutil

    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                members.append(pid)
    return members


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # collects the leader
    return not group_members(process.pid)


def relevant_lines(log: Path, n_last: int = 12) -> list[str]:
    """What a person needs of a failed process's log: the lines that name an error, then the last ones."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line.rstrip() for line in lines if line.strip()]
    last = lines[-n_last:]
    errors: dict[str, None] = {}
    for line in lines[: len(lines) - len(last)]:
        # vLLM prefixes every line of a traceback: "(EngineCore pid=7) ERROR 11-21 03:20:00 [core.py:1] ValueError: ..."
        message = line.rsplit("] ", 1)[-1].strip()
        name = message.split(":", 1)[0]
        if name.rsplit(".", 1)[-1].endswith(("Error", "Exception")) and " " not in name:
            errors[message] = None
    return [*list(errors)[:3], *last]
