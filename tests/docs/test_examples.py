"""The examples run as their README says: on the bundled model, without an argument."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import preloaded
from tests.docs.markdown import ROOT
from tests.engine.support import environment

EXAMPLES = ROOT / "examples"
QUIET = {"VLLM_NO_USAGE_STATS": "1"}


def run(*command: str, **variables: str) -> str:
    environment()
    scripts = Path(sys.executable).parent
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, **QUIET, "PATH": path, **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.engine
def test_offline(tmp_path: Path) -> None:
    said = preloaded.run([str(EXAMPLES / "offline.py")], QUIET, tmp_path / "said")
    assert "-> ' 48213" in said
    assert "-> ' 90071" in said
    assert "layers: {'PagedImpl'}" in said


@pytest.mark.engine
def test_compare_methods(tmp_path: Path) -> None:
    said = preloaded.run([str(EXAMPLES / "compare_methods.py")], QUIET, tmp_path / "said")
    found = dict(re.findall(r"^(\S.*?)\s+(\d) of 6 right", said, flags=re.M))
    capacity = dict(re.findall(r"^(\S.*?)\s+\d of 6 right\s+([\d,]+) tokens", said, flags=re.M))
    assert list(found) == ["dense", "sparq", "kivi", "sparq over int4", "h2o, half of the prompt"]
    assert found["dense"] == found["sparq"] == "6"
    assert found["h2o, half of the prompt"] < "6"  # what was evicted is gone
    n_tokens = {name: int(text.replace(",", "")) for name, text in capacity.items()}
    assert n_tokens["kivi"] > 3 * n_tokens["dense"]


@pytest.mark.engine
@pytest.mark.long
def test_serve() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = run("bash", str(EXAMPLES / "serve.sh"), PORT=str(port), VLLM_LOGGING_LEVEL="ERROR")
    assert '"text":" 48213' in said.replace('": "', '":"')


def test_every_example_is_described_and_run() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    described = set(re.findall(r"\]\((\w+\.\w+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert files == described
    assert {name.partition(".")[0] for name in files} <= tested
