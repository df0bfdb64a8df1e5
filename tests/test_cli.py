"""The command line: help that teaches, errors that help, and nothing imported before it is needed."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys

import pytest

from vllm_sparq import cli, processes
from vllm_sparq.config import Options
from vllm_sparq.console import UsageError, sparq_options


def run(*words: str) -> int:
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_names_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for command in cli.COMMANDS:
        assert command.split()[0] in text


@pytest.mark.parametrize("command", ["doctor", "demo"])
def test_help_of_a_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert text.count(f"  vllm-sparq {command}") >= 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vllm_sparq.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'rich', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_command_is_a_module_with_arguments_and_main(command: str) -> None:
    path, _ = cli.COMMANDS[command]
    module = importlib.import_module(path)
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.main)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a command"),
        (("dmo",), "invalid choice: 'dmo'"),
        (("bench",), "COMMAND"),
        (("doctor", "--modle", "x"), "unrecognized arguments: --modle x"),
        (("doctor", "--options", "{compression: 4}"), "is not JSON"),
        (("doctor", "--options", '{"compresion": 4}'), "Did you mean 'compression'?"),
        (("demo", "--sparq", '{"k": 0}'), "k=0 is not usable"),
        (("demo", "--sparq", "[1]"), "must be an object of options"),
        (("doctor", "--options", "[" * 5000), "is not JSON (maximum recursion depth exceeded"),
        (("doctor", "--serve-args", "[" * 5000), "is not JSON (maximum recursion depth exceeded"),
        (("bench", "serve", "--serve-args", '[["x"]]'), "is not a JSON list of words"),
    ],
)
def test_bad_usage_is_explained(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_options_may_be_wrapped_as_vllm_wants_them() -> None:
    options = {"compression": 4.0, "dense_below": 0}
    plain, wrapped = (sparq_options(json.dumps(given)) for given in (options, {"sparq": options}))
    assert plain == wrapped == Options(compression=4.0, dense_below=0)


def test_usage_errors_and_signals_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = importlib.import_module("vllm_sparq.benchmarks.serving.demo")

    def fail(error: BaseException) -> None:
        def main(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(demo, "main", main)

    fail(UsageError("no such folder"))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "vllm-sparq demo: no such folder\n"
    fail(processes.Stopped(15))
    assert cli.main(["demo"]) == 143
    assert capsys.readouterr().err == "vllm-sparq demo: stopped by SIGTERM\n"


@pytest.mark.parametrize(
    ("command", "option", "example"),
    [
        ("doctor", "--options", '{"compression": 4}'),
        ("doctor", "--serve-args", '["--dtype", "auto"]'),
        ("demo", "--sparq", '{"compression": 4}'),
        ("eval", "--options", '{"compression": 4}'),
        ("eval", "--engine-args", '{"max_model_len": 4096}'),
        ("tune", "--engine-args", '{"max_model_len": 4096}'),
        ("bench engine", "--choice", '{"compression": 4}'),
        ("bench serve", "--serve-args", '["--dtype", "auto"]'),
        ("bench pressure", "--engine-args", '{"max_model_len": 4096}'),
        ("bench ray", "--engine-args", '{"max_model_len": 4096}'),
        ("bench ray", "--runtime-env", '{"env_vars": {"NAME": "value"}}'),
    ],
)
def test_what_is_not_json_is_answered_by_what_the_option_takes(
    command: str, option: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An example of other options, pasted, would be refused or mean nothing."""
    assert run(*command.split(), option, "dtype=auto") == 2
    assert f"write for example '{example}', in single quotes" in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    parser.parse_args([option, example])
