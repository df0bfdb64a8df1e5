"""Any process of a command may be killed at any moment: nothing is lost, nobody stays behind, the next run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.long]

ROUNDS = 5
PATIENCE_S = 20.0
"""How long what the killed process leaves may take to end: vLLM and Ray stop their own trees."""

MARK = "SPARQ_TEST_KILLED"
"""In the environment of every process of a run, so that those that moved to another parent are found, too."""

COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "--tasks", "needle", "--lengths", "1500", "--n", "40", "--methods", "int8", "--out", "{folder}"],
    "tune": ["tune", "--n", "2", "--context", "700", "--batch", "2", "--trials", "4", "--out", "{folder}"],
    "ray": ["bench", "ray", "--n", "48", "--out", "{folder}/answers", "--record", "{folder}/ray.jsonl"],
    "serve": ["bench", "serve", "--num-prompts", "16", "--request-rate", "8,inf", "--out", "{folder}/serve.jsonl"],
}


def family(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark of a run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def lines_of(folder: Path) -> dict[str, list[str]]:
    """The whole lines of every store that is text."""
    return {
        str(path.relative_to(folder)): path.read_text().split("\n")[:-1]
        for path in sorted(folder.rglob("*.jsonl"))
        if path.is_file()
    }


def shards_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", COMMANDS)
def test_whoever_is_killed(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    folder = tmp_path / "results"
    folder.mkdir()
    words = [word.format(folder=folder) for word in COMMANDS[name]]
    code = "import sys; from vllm_sparq.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words]
    for i in range(ROUNDS):
        mark = f"{os.getpid()}-{name}-{i}"
        with (tmp_path / f"log{i}").open("w") as log:
            parent = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, MARK: mark}, start_new_session=True
            )
            moment = time.monotonic() + draw.uniform(2, 45)
            while time.monotonic() < moment and parent.poll() is None:
                time.sleep(0.1)
            before, shards = lines_of(folder), shards_of(folder)
            there = family(mark)
            if there:
                # In every other round the command itself, which can then tidy nothing.
                victim = psutil.Process(parent.pid) if i % 2 == 0 and parent.poll() is None else draw.choice(there)
                killed = f"round {i}: {' '.join(victim.cmdline()[:6])}"
                victim.send_signal(signal.SIGKILL)
                if victim.pid != parent.pid:
                    parent.wait(300)  # it goes on without that process, or ends with a sentence
                _, alive = psutil.wait_procs(family(mark), timeout=PATIENCE_S)
                assert not family(mark), (killed, [one.cmdline() for one in alive])
            parent.wait(10)
        after = lines_of(folder)
        for path, lines in before.items():
            assert after[path][: len(lines)] == lines, path
        assert shards <= shards_of(folder)

    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for path, lines in lines_of(folder).items():
        for line in lines:
            assert json.loads(line), path
        keys = [json.loads(line).get("key") for line in lines]
        assert None in keys or len(set(keys)) == len(keys), path
