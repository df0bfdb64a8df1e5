"""Servers are started, asked and surely stopped: with small stand-ins for vLLM, so that every ending can be tried."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq import processes
from vllm_sparq.benchmarks.common.server import HOST, Server, ServerError, free_port, is_taken, wait_until_healthy

# A leader and a child that both ignore polite requests; the child says when they are ready.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"]).wait()
print("ready", flush=True)
time.sleep(100)
"""

ANSWER = {"choices": [{"text": " 4217"}], "usage": {"prompt_tokens": 30, "completion_tokens": 3}}
METRICS = """\
# TYPE vllm:request_decode_time_seconds histogram
vllm:request_decode_time_seconds_bucket{{engine="0",le="0.3"}} {n}
vllm:request_decode_time_seconds_count{{engine="0"}} {n}
vllm:request_decode_time_seconds_sum{{engine="0"}} {s}
vllm:request_decode_time_seconds_created{{engine="0"}} 1.7e+09
"""


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def start_stubborn(folder: Path, run: Any) -> Path:
    (folder / "stubborn.py").write_text(STUBBORN)
    log = folder / "log"
    run([sys.executable, str(folder / "stubborn.py")], log=log, folder=folder, environment=os.environ)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    return log


def test_a_group_that_ignores_sigterm_is_killed_whole(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start_stubborn(tmp_path, lambda *a, **k: started.append(processes.start_group(*a, **k)))
    assert len(processes.group_members(started[0].pid)) == 2
    processes.stop_group(started[0], patience_s=0.3)
    assert processes.group_members(started[0].pid) == []
    processes.stop_group(started[0])  # once more does no harm


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    parent = f"""
import os, sys, time
from pathlib import Path
from vllm_sparq import processes
command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"]
processes.start_group(command, log=Path({str(log)!r}), folder=Path("/"), environment=os.environ)
time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        wait_for(lambda: log.exists() and log.read_text().strip().isdigit())
        child = int(log.read_text())
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: processes.group_members(child) == [])


def test_stop_signals_raise_once_and_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with processes.raising_on_stop_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while tidying up: ignored
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(processes.Stopped) as caught:
        work()
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_relevant_lines_begin_with_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    prefix = "(EngineCore pid=7) ERROR 11-21 03:20:00 [core.py:1]"
    cause = "ValueError: sparq option k=0 is not usable"
    lines = [
        f"{prefix} Traceback",
        f"{prefix} {cause}",
        f"{prefix} {cause}",
        *["noise"] * 20,
        "RuntimeError: see above",
    ]
    log.write_text("\n".join(lines))
    assert processes.relevant_lines(log, n_last=2) == [cause, "noise", "RuntimeError: see above"]
    assert processes.relevant_lines(tmp_path / "missing") == []


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    server = Server("sparq", tmp_path, [], folder=tmp_path)
    server.command = [sys.executable, "-c", "raise ValueError('no such option')"]
    with server, pytest.raises(ServerError) as caught:
        wait_until_healthy([server], timeout_s=30)
    message = str(caught.value)
    assert message.startswith("vllm serve (sparq) ended with exit code 1")
    assert str(server.log) in message
    assert "ValueError: no such option" in message


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    server = Server("dense", tmp_path, [], folder=tmp_path)
    server.command = [sys.executable, "-c", "import time; time.sleep(100)"]
    with pytest.raises(ServerError, match="was not ready after 1 seconds"), server:
        wait_until_healthy([server], timeout_s=1)
    assert server.process is not None
    assert processes.group_members(server.process.pid) == []


def test_a_port_is_taken_while_somebody_listens() -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        assert is_taken(other.getsockname()[1])
    assert not all(is_taken(free_port()) for _ in range(9))  # other programs may be quick, but not each time


class FakeVllm(BaseHTTPRequestHandler):
    """Answers as vLLM does; its metrics lag behind, as vLLM's may."""

    asked: list[dict[str, Any]]
    n_done: int
    n_told: int

    def do_GET(self) -> None:
        kind = type(self)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(METRICS.format(n=kind.n_told, s=0.25 * kind.n_told).encode())
        kind.n_told = kind.n_done

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        type(self).n_done += 1
        self.send_response(400 if body.get("max_tokens") == 0 else 200)
        self.end_headers()
        report = {"results": [{"layer 0": {"backend": "SPARQ"}}]}
        self.wfile.write(json.dumps(report if self.path == "/collective_rpc" else ANSWER).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Server]:
    FakeVllm.asked, FakeVllm.n_done, FakeVllm.n_told = [], 7, 7
    with ThreadingHTTPServer((HOST, 0), FakeVllm) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        server = Server("sparq", tmp_path, [], folder=tmp_path, port=httpd.server_port)
        server.command = [sys.executable, "-c", "import time; time.sleep(100)"]
        with server:
            wait_until_healthy([server], timeout_s=30)
            yield server
        httpd.shutdown()


def test_a_completion_is_timed_by_the_engine(fake: Server) -> None:
    answer = fake.complete("The key is", max_tokens=9, stop=(".",))
    assert (answer.text, answer.n_prompt_tokens, answer.n_tokens) == (" 4217", 30, 3)
    assert answer.s_per_token == pytest.approx(0.25 / 2)  # two steps after the first token
    (asked,) = FakeVllm.asked
    assert asked["temperature"] == 0
    assert asked["stop"] == ["."]


def test_the_worker_is_asked_what_it_runs(fake: Server) -> None:
    assert fake.attention_report() == {"layer 0": {"backend": "SPARQ"}}
    assert FakeVllm.asked == [{"method": "attention_report"}]


def test_an_error_of_the_server_is_raised(fake: Server) -> None:
    with pytest.raises(ServerError, match="answered 400"):
        fake.complete("", max_tokens=0)
