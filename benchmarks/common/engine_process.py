"""A worker in a process of its own, which does what it is told to and never outlives us.

vLLM cannot start a second engine in a process, and an engine that dies must not take a measurement with it. The worker
is any class; its public methods are the orders that it takes, one at a time. However we end, the child ends too: it
watches a pipe whose other end only we hold, and the kernel kills it as well. An engine in the middle of its work would
not notice that nobody asks any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_sparq.console import UsageError

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in the worker's process, where it can be asked
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What every worker starts with."""

DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TQDM_DISABLE": "1"}
"""What it starts with unless the user's environment says something else."""

IN_TURNS = {"OMP_WAIT_POLICY": "passive"}
"""For engines that work in turns: one that waits must not burn the cores of another."""

PR_SET_PDEATHSIG = 1
PATIENCE_S = 30.0
"""How long a worker may take to end when it is told to."""

LINES_SAID = 12
"""Of what a worker printed last, kept of one that is gone."""


class WorkerGoneError(UsageError):
    """A worker that ended, failed or did not answer in time.

    Attributes:
        said: the last lines that it printed, a traceback if there was one.
    """

    def __init__(self, message: str, said: Sequence[str]) -> None:
        super().__init__(message)
        self.said = list(said)


class EngineProcess:
    """Our side of the process; a context manager, or `start` and `close`.

    Args:
        name: for messages, such as "the dense engine".
        make: the worker's class, or what makes one; must be found by its name in another process.
        arguments: of ``make``.
        environment: variables beside `ENVIRONMENT`.
    """

    def __init__(
        self, name: str, make: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.make, self.arguments = name, make, arguments
        self.environment = {**DEFAULTS, **os.environ, **ENVIRONMENT, **(environment or {})}
        self.log: Path | None = None

    def start(self, within: float | None = None) -> None:
        """Start the process, and wait until its worker is made, so many seconds at most.

        Raises:
            WorkerGoneError: it could not be made.
        """
        context = multiprocessing.get_context("spawn")
        descriptor, log = tempfile.mkstemp(prefix="vllm-sparq-engine-", suffix=".log")
        os.close(descriptor)
        self.log = Path(log)
        self.pipe, theirs = context.Pipe()
        watched, self.held = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve,
            args=(os.getpid(), watched, self.environment, self.make, self.arguments, self.log, theirs),
            daemon=True,
        )
        with _environment(self.environment):  # before its first import: OpenMP reads its own when it is loaded
            self.process.start()
        theirs.close()
        watched.close()
        try:
            self._receive(within)
        except BaseException:
            self.kill()
            raise

    def ask(self, order: str, *arguments: Any, within: float | None = None) -> Any:
        """What the worker's method of that name returns, in so many seconds at most.

        Raises:
            WorkerGoneError: it raised, the process is gone, or it has not answered: then it still runs.
        """
        with contextlib.suppress(BrokenPipeError):  # it is gone, which is found out and said below
            self.pipe.send((order, arguments))
        return self._receive(within)

    def close(self) -> None:
        """End it in peace, if it still runs."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
            self.process.join(PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.pipe.close()
        self.held.close()
        if self.log is not None:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _receive(self, within: float | None) -> Any:
        if within is not None and not self.pipe.poll(max(within, 0.0)):
            raise WorkerGoneError(f"{self.name} has not answered within {within:.0f} s", self._said())
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            said = self._said()
            last = said[-1].strip() if said else "nothing"
            raise WorkerGoneError(f"{self.name} ended before it answered, after saying {last}", said) from None
        if kind == "error":
            raise WorkerGoneError(f"{self.name}: {value}", self._said())
        return value

    def _said(self) -> list[str]:
        assert self.log is not None
        return self.log.read_text(errors="replace").strip().splitlines()[-LINES_SAID:]


def telling_line(error: BaseException) -> str:
    """The line of a message that says what is wrong; those of pydantic and of assertions have others around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Value error", "Assertion failed"))]
    return (telling or lines or ["no reason given"])[0].split(" [type=")[0]


def _serve(
    parent: int,
    watched: Connection,
    environment: Mapping[str, str],
    make: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path,
    pipe: Connection,
) -> None:
    """The process: makes the worker, does what it is told to until it is told to end or nobody is there.

    What vLLM and its libraries print goes to ``log``, so that it does not tear progress bars and tables apart.
    """
    _end_with(parent, watched)
    os.environ.update(environment)  # a fork server has that of the first process which it started
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        worker = make(*arguments)
        pipe.send(("done", None))
        while (order := pipe.recv()) is not None:
            pipe.send(("done", getattr(worker, order[0])(*order[1])))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("error", f"{type(error).__name__}: {telling_line(error)}"))


def _end_with(parent: int, watched: Connection) -> None:
    """End this process when the other end of the pipe is closed, at the latest when its holder is gone.

    Where the holder is our parent (it is not where a fork server starts processes) the kernel sees to it too, which no
    library can hold up.
    """

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            watched.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux" and os.getppid() == parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """These variables and no others, for what is started meanwhile."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
