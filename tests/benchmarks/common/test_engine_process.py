"""A worker in a process of its own: orders, errors, its environment, and that it ends with us, however we end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.common.workers import Toy
from vllm_sparq.benchmarks.common.engine_process import IN_TURNS, EngineProcess
from vllm_sparq.console import UsageError

ROOT = Path(__file__).parents[3]

PARENT = """
import sys
from tests.benchmarks.common.workers import Toy
from vllm_sparq.benchmarks.common.engine_process import EngineProcess
from vllm_sparq.processes import raising_on_stop_signals

if __name__ == "__main__":
    with raising_on_stop_signals(), EngineProcess("the toy", Toy) as engine:
        print(engine.process.pid, flush=True)
        engine.ask("spin")
"""


def test_orders_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with EngineProcess("the toy", Toy, "world", environment=IN_TURNS) as engine:
        assert engine.ask("add", 2, 3) == 5
        found = {name: engine.ask("variable", name) for name in ("OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "HOME")}
        assert found == {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "HOME": os.environ.get("HOME")}
        assert engine.ask("variable", "VLLM_CPU_OMP_THREADS_BIND") == "0-1"
        assert "OMP_WAIT_POLICY" not in os.environ
        assert engine.log is not None
        assert engine.log.read_text() == "hello world\n"
        process, log = engine.process, engine.log
    assert not process.is_alive()
    assert not log.exists()


def test_errors_are_said_in_a_line() -> None:
    with pytest.raises(UsageError, match=r"^the toy: ValueError: Value error, greeting is refused$"):
        EngineProcess("the toy", Toy, "refuse").start()
    for order, message in (
        ("fail", "^the toy: RuntimeError: the first line$"),
        ("vanish", "^the toy ended before it answered, after saying the last word$"),
    ):
        with EngineProcess("the toy", Toy) as engine, pytest.raises(UsageError, match=message):
            engine.ask(order)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_busy_worker_ends_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)  # it spins by now
    assert worker.is_running()
    parent.send_signal(number)
    parent.wait(20)
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"the worker outlives its parent, which {number.name} ended"
            time.sleep(0.05)


def test_a_worker_of_a_fork_server_ends_when_the_pipe_is_closed() -> None:
    """The server is the worker's parent then, and stays."""
    code = """
import multiprocessing, os, signal, time
from vllm_sparq.benchmarks.common.engine_process import _end_with
watched, held = multiprocessing.Pipe(duplex=False)
pid = os.fork()
if pid == 0:
    held.close()
    _end_with(os.getpid(), watched)
    while True:
        pass
time.sleep(0.2)
assert os.waitpid(pid, os.WNOHANG) == (0, 0)
held.close()
print(os.waitpid(pid, 0)[1] == signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "True\n", done.stderr
