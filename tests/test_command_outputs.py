"""A command that cannot write where it is told to says so at once, before it looks at a model."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq import cli
from vllm_sparq.console import place

READ = {"--model", "--text", "--haystack", "--data", "--ship", "--beside", "results"}
"""Options whose path is read; any other is written."""


def paths_of(command: str) -> list[str]:
    """Options of a command that take a path."""
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    taking = [action for action in parser._actions if action.type is place]
    return [action.option_strings[0] if action.option_strings else action.dest for action in taking]


WRITTEN = [(command, option) for command in cli.COMMANDS for option in paths_of(command) if option not in READ]
OF_MODELS = [one for one in WRITTEN if "--model" in paths_of(one[0])]


def words_of(command: str, option: str, out: Path, folder: Path) -> list[str]:
    """A command line with that place, which would end for want of a model if the place were good."""
    words = [*command.split(), option, str(out)]
    if "--model" in paths_of(command):
        words += ["--model", str(folder / "no-model")]
    if command == "report":
        (folder / "lines.jsonl").write_text('{"bench": "ops"}\n')
        words.append(str(folder / "lines.jsonl"))
    return words


def test_commands_that_write_are_here() -> None:
    named = {command for command, option in WRITTEN}
    assert {"demo", "bench ops", "eval", "sweep", "tune", "report", "research reads"} < named
    assert [one for one in WRITTEN if one[0] == "bench ray"] == [("bench ray", "--out"), ("bench ray", "--record")]


@pytest.mark.parametrize("where", ["below a file", "where nobody can write", "in folders that nobody can make"])
@pytest.mark.parametrize(("command", "option"), WRITTEN, ids=[" ".join(one) for one in WRITTEN])
def test_it_is_said_before_a_model_is_looked_at(
    command: str, option: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    above = {"below a file": tmp_path / "file", "where nobody can write": Path("/proc")}
    out = above.get(where, Path("/proc") / "no" / "such") / "x.html"
    assert exit_code(*words_of(command, option, out, tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"{option} {out} cannot be" in said
    assert "give a f" in said  # a file, or a folder


@pytest.mark.parametrize(("command", "option"), OF_MODELS, ids=[" ".join(one) for one in OF_MODELS])
def test_a_command_that_is_refused_leaves_nothing_there(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words_of(command, option, tmp_path / "deep" / "deeper" / "x.jsonl", tmp_path)) == 2
    assert "no-model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["eval", "sweep"])
def test_a_file_in_the_folder_that_cannot_be_added_to(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cells.jsonl").mkdir()
    assert exit_code(*words_of(command, "--out", tmp_path, tmp_path)) == 2
    assert f"--out {tmp_path / 'cells.jsonl'} cannot be written" in capsys.readouterr().err
