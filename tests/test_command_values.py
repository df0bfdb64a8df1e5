"""Every value of every command is checked before an engine starts: whatever is written, no traceback."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.benchmarks.commands import exit_code
from vllm_sparq import cli
from vllm_sparq.benchmarks.common import engine_process, server
from vllm_sparq.benchmarks.tiny_model import WEIGHTS

SMALL = {
    "doctor": ["--quick"],
    "models": ["get", "smollm2-135m"],
    "demo": ["--lengths", "300", "--questions", "1"],
    "bench ops": ["--shape", "2/1/64", "--context", "64", "--repeats", "1", "--methods", "dense"],
    "eval": ["--tasks", "needle", "--lengths", "300", "--n", "1"],
    "sweep": ["--tasks", "needle", "--lengths", "300", "--n", "1", "--r", "8", "--k", "32"],
    "tune": ["--n", "1", "--context", "400"],
    "bench engine": ["--model", str(WEIGHTS), "--context", "512", "--batch", "1"],
    "bench serve": ["--num-prompts", "2"],
    "bench pressure": ["--n", "2"],
    "bench ray": ["--n", "2", "--replicas", "1"],
    "research reads": ["--tasks", "needle", "--lengths", "300", "--n", "1"],
    "research kivi": ["--tasks", "needle", "--lengths", "300", "--n", "1"],
    "research retention": ["--tasks", "needle", "--lengths", "300", "--n", "1"],
    "research mass": ["--tasks", "needle", "--lengths", "300", "--n", "1"],
    "research bits": ["--n", "1", "--length", "300"],
    "research positions": ["--n", "1", "--trained", "600", "--budget", "64"],
    "research conversation": ["--n", "1", "--length", "300", "--turns", "2"],
    "report": [],
}
"""Command -> what makes it short."""

NUMBERS = ["", " ", "0", "-1", "1", "2", "7", "1.5", "1e3", "1e999", "nan", "-inf", "inf", "9" * 40, "0x10", "１", "x"]
LISTS = [
    ",",
    "1,,2",
    "8,0",
    "8,-4",
    "2,4",
    "sparq,kivi",
    "sparq,",
    "needle,nan",
    "text",
    "squad",
    "sparq+int4",
    "quest",
]
JSON = ["null", "5", "[1]", "{", "{}", '"x"', '{"k": -1}', '{"compression": NaN}', '{"max_model_len": "x"}', "[" * 5000]
JSON += [
    '{"a": 1}',
    '{"sparq": 3}',
    '{"block_size": 0}',
    '{"max_model_len": 64}',
    '["--block-size", "x"]',
    '{"k": 1e400}',
]
PATHS = ["/", ".", "/dev/null", "/dev/full", "/dev/null/x", "/proc/x", "no/such/file.jsonl", "a" * 5000, "~", "é\udc80"]
FOUND = ["BROKEN", "BINARY", "EMPTY", "MODEL", "NO_MODEL", "LINES", "FILE"]
"""Names of what the test makes, beside values that need nothing."""


class Started(Exception):
    """An engine, a server, a cluster or a model would start now: the values have been checked."""


def start(*_: Any, **__: Any) -> Any:
    raise Started


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders to name."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("broken", "no_model", "empty"):
        (folder / name).mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": "x"')
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "lines.jsonl").write_text('{"prompt": "a"}\n{"bench": "ops"}\n')
    (folder / "file.txt").write_text("Some words. " * 30)
    names = {"BROKEN": "broken", "BINARY": "binary", "EMPTY": "empty", "NO_MODEL": "no_model", "LINES": "lines.jsonl"}
    return {"MODEL": str(WEIGHTS), **{key: str(folder / name) for key, name in (names | {"FILE": "file.txt"}).items()}}


@pytest.fixture(scope="module", autouse=True)
def _nothing_starts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("here"))
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    patch.setattr(engine_process.EngineProcess, "start", start)
    patch.setattr(server.Server, "__enter__", start)
    for module, name in (
        ("doctor.command", "checks"),
        ("models.folders", "fetch"),
        ("benchmarks.ops.decode", "ready_calls"),
        ("benchmarks.cluster.bench", "cluster"),
        ("benchmarks.simulation.reads", "load"),
        ("benchmarks.simulation.kivi", "load_plain"),
        ("benchmarks.simulation.retention", "load"),
        ("benchmarks.quality.mass_curve", "Curve"),
        ("benchmarks.reporting.page", "build"),
        ("benchmarks.reporting.page", "write_documents"),
    ):
        patch.setattr(importlib.import_module(f"vllm_sparq.{module}"), name, start)
    yield
    patch.undo()


def options_of(command: str) -> list[str]:
    """Options of a command that take a value; ``""`` is its place without a name."""
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    taking = [action for action in parser._actions if action.nargs != 0]
    return [action.option_strings[0] if action.option_strings else "" for action in taking]


def outcome(words: list[str]) -> str:
    """What becomes of a command line: "started", or its exit code.

    The commands run on the main thread of a process; what they print is of no interest.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return str(exit_code(*words))
        except Started:
            return "started"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_small_commands_reach_their_engines(command: str, made: dict[str, str]) -> None:
    """Else nothing below would show anything."""
    more = [made["LINES"]] if command == "report" else []
    assert outcome([*command.split(), *SMALL[command], *more]) == "started"


CASES = [(command, option) for command in cli.COMMANDS for option in options_of(command)]


@pytest.mark.slow
@settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(CASES),
    value=st.one_of(
        st.sampled_from([*NUMBERS, *LISTS, *JSON, *PATHS, *FOUND]), st.text(max_size=6).filter(str.isprintable)
    ),
    second=st.one_of(st.none(), st.tuples(st.integers(0, 40), st.sampled_from([*NUMBERS, *LISTS, *JSON, *FOUND]))),
)
def test_no_value_gives_a_traceback(
    case: tuple[str, str], value: str, second: tuple[int, str] | None, made: dict[str, str]
) -> None:
    command, option = case
    given_values = [(option, value)]
    if second is not None:
        options = options_of(command)
        given_values.append((options[second[0] % len(options)], second[1]))
    words = [*command.split(), *SMALL[command]]
    for name, text in given_values:
        text = made.get(text, text).replace("\0", "")  # no command line holds that
        words += [f"{name}={text}"] if name else [text]
    assert outcome(words) in ("started", "1", "2", "0"), words
    assert threading.current_thread() is threading.main_thread()
