"""A `vllm serve` process for demonstrations and measurements: on loopback, asked by HTTP, and surely stopped again."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_sparq import processes

HOST = "127.0.0.1"

WORKER_REPORT = "vllm_sparq.attention_backends.worker.AttentionReport"
"""Worker extension that lets any backend say what it runs. Ours have it built in, and vLLM refuses to add it twice."""

DECODE_TIME = "vllm:request_decode_time_seconds"
METRICS_TIMEOUT_S = 5.0
RESET_TIMEOUT_S = 30.0

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # offers POST /collective_rpc and /reset_prefix_cache
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two servers share the cores
    "PYTHONUNBUFFERED": "1",
}
CLEARED = ("VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PORT")
"""Variables of the user's that would change what the servers are."""


class ServerError(RuntimeError):
    """A server did not start, ended, or answered with an error; the message shows where its log is and how it ends."""


@dataclass(frozen=True)
class Completion:
    """One greedy completion.

    Attributes:
        text: what was generated.
        n_prompt_tokens: as the server counted them.
        n_tokens: generated tokens.
        decode_s: seconds from the first to the last generated token, as the engine core counts them (what a client sees
            depends on when it gets a core to run on); None if it did not tell.
    """

    text: str
    n_prompt_tokens: int
    n_tokens: int
    decode_s: float | None

    @property
    def s_per_token(self) -> float | None:
        """Time per output token after the first one; None where it is not known."""
        return None if self.decode_s is None or self.n_tokens < 2 else self.decode_s / (self.n_tokens - 1)


class Server:
    """`vllm serve MODEL ARGUMENTS` as a context: started on entry, its whole process group stopped on exit.

    Args:
        folder: where it runs and writes its log.
        environment: variables for it, unless the user has set them.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        arguments: Sequence[str],
        *,
        folder: Path,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.environment = dict(environment or {})
        self.port = port or free_port()
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve())),
            *("--host", HOST, "--port", str(self.port), "--served-model-name", name, *arguments),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        inherited = {name: value for name, value in os.environ.items() if name not in CLEARED}
        environment = {**self.environment, **inherited, **ENVIRONMENT}
        self.process = processes.start_group(self.command, log=self.log, folder=self.folder, environment=environment)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None:
            processes.stop_group(self.process)

    def is_healthy(self) -> bool:
        """Whether it answers.

        Raises:
            ServerError: it has ended.
        """
        if self.process is None or self.process.poll() is not None:
            code = "" if self.process is None else f" with exit code {self.process.returncode}"
            raise self.error(f"vllm serve ({self.name}) ended{code}")
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def error(self, message: str) -> ServerError:
        """The message with what the log says."""
        lines = "\n".join(f"  | {line}" for line in processes.relevant_lines(self.log))
        return ServerError(f"{message}. Its log: {self.log}\n{lines}")

    def attention_report(self) -> dict[str, dict[str, Any]]:
        """Layer -> what the first worker runs for it (`AttentionReport.attention_report`)."""
        answer = self._ask("POST", "/collective_rpc", {"method": "attention_report"})
        reports: list[dict[str, dict[str, Any]]] = json.loads(answer)["results"]
        return reports[0]

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix.

        Raises:
            ServerError: blocks are still held after some seconds, as if requests were running.
        """
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while not json.loads(self._ask("POST", "/reset_prefix_cache", {}))["success"]:
            if time.monotonic() > deadline:
                raise self.error(f"vllm serve ({self.name}) holds cached blocks and did not let go of them")
            time.sleep(0.1)

    def metrics(self) -> list[tuple[str, dict[str, str], float]]:
        """Name, labels and value of everything that `/metrics` shows."""
        from prometheus_client.parser import text_string_to_metric_families

        families = text_string_to_metric_families(self._ask("GET", "/metrics").decode())
        return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]

    def complete(self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()) -> Completion:
        """A greedy completion from the OpenAI API, timed by the engine. One at a time, or the times mix."""
        body = {"model": self.name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stop": list(stop)}
        n_before, s_before = self._decode_time()
        answer = json.loads(self._ask("POST", "/v1/completions", body))
        deadline = time.monotonic() + METRICS_TIMEOUT_S
        n_after, s_after = self._decode_time()
        while n_after == n_before and time.monotonic() < deadline:
            time.sleep(0.02)
            n_after, s_after = self._decode_time()
        return Completion(
            text=answer["choices"][0]["text"],
            n_prompt_tokens=answer["usage"]["prompt_tokens"],
            n_tokens=answer["usage"]["completion_tokens"],
            decode_s=s_after - s_before if n_after == n_before + 1 else None,
        )

    def _decode_time(self) -> tuple[int, float]:
        """Requests so far, and the seconds that they decoded for."""
        sums = {"count": 0.0, "sum": 0.0}
        for line in self._ask("GET", "/metrics").decode().splitlines():
            name, _, value = line.rpartition(" ")
            name = name.partition("{")[0]
            if name in (f"{DECODE_TIME}_count", f"{DECODE_TIME}_sum"):
                sums[name.removeprefix(f"{DECODE_TIME}_")] += float(value)
        return int(sums["count"]), sums["sum"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=300)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as failure:
            raise self.error(f"vllm serve ({self.name}) broke off: {failure!r}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise self.error(f"vllm serve ({self.name}) answered {response.status}: {content.decode(errors='replace')}")
        return content


def wait_until_healthy(
    servers: Sequence[Server], *, timeout_s: float, on_ready: Callable[[Server], None] = lambda server: None
) -> None:
    """Wait for all of them; `on_ready` hears of each.

    Raises:
        ServerError: one ended, or was not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            if server.is_healthy():
                waiting.remove(server)
                on_ready(server)
            elif time.monotonic() > deadline:
                raise server.error(f"vllm serve ({server.name}) was not ready after {timeout_s:.0f} seconds")
        time.sleep(0.25)


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def is_taken(port: int) -> bool:
    """Whether another program listens there, whose answers would be taken for those of a server of ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: connections that end are no matter
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
        return False
