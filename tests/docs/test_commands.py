"""Every command and every set of options in the documents can be used as written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from tests.docs.commands import choice_problem, commands, is_choice, options_problem, problem
from tests.docs.markdown import ROOT, code_lines, documents, inline_code


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_can_be_run_as_written(path: Path) -> None:
    found = {command: problem(command) for command in commands(path.read_text(encoding="utf-8"))}
    wrong = [f"{command}: {why}" for command, why in found.items() if why]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_options_mean_something(path: Path) -> None:
    wrong = []
    for code in inline_code(path.read_text(encoding="utf-8")):
        with contextlib.suppress(json.JSONDecodeError):
            given = json.loads(code)
            if isinstance(given, dict) and given:
                problem_of = choice_problem if is_choice(given) else options_problem
                wrong += [why for why in [problem_of(given)] if why]
    assert not wrong, "\n".join(wrong)


def test_enough_is_looked_at() -> None:
    assert sum(len(list(commands(path.read_text(encoding="utf-8")))) for path in documents()) > 60


@pytest.mark.parametrize(
    "command",
    [
        "vllm-sparq no-such-command",
        "vllm-sparq eval --no-such-flag",
        "vllm-sparq bench",
        "vllm serve M --attention-backend flash",
        'vllm serve M --attention-backend kivi --additional-config \'{"sparq": {"budget": 3}}\'',
        "make no-such-target",
        "python -m vllm_sparq.benchmarks.no_such_module",
        "python examples/no_such_file.py",
        "python benchmarks/gpu/gpu_check.py --no-such-flag",
        "pip install ./no_such_folder",
    ],
)
def test_what_cannot_work_is_found_out(command: str) -> None:
    assert problem(command)


def test_a_choice_of_a_request_is_looked_at() -> None:
    assert is_choice({"sparq": "off"})
    assert not is_choice({"sparq": {"k": 5}})
    assert is_choice(wrong := {"sparq.budget": 5})
    assert choice_problem(wrong)
    assert choice_problem({"sparq.k": 5}) is None


def test_commands_are_found_where_they_stand() -> None:
    text = "Say `vllm-sparq doctor\n--quick`, `compression` or:\n\n"
    text += "    A=1 make demo   # a comment\n    vllm serve \\\n        M\n"
    assert list(commands(text)) == ["make demo", "vllm serve M", "vllm-sparq doctor --quick"]
    assert list(code_lines("```\nmake test\n\nmake demo\n```\n")) == ["make test", "make demo"]
