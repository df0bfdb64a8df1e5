"""What surrounds the code agrees with it: the workflow, the hooks, the changelog, the citation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.docs.commands import problem
from tests.docs.markdown import ROOT
from vllm_sparq import __version__

HIDDEN = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def loaded(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", HIDDEN, ids=lambda path: path.name)
def test_they_can_be_read(path: Any) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_workflow_runs_what_exists() -> None:
    jobs = loaded(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) >= 6
    assert not [why for why in map(problem, commands) if why]


def test_hooks_use_the_linters_of_the_lock() -> None:
    revisions = {hook["repo"].rpartition("/")[2]: hook["rev"] for hook in loaded(".pre-commit-config.yaml")["repos"]}
    lines = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line)
    assert revisions["ruff-pre-commit"] == f"v{locked['ruff']}"
    assert revisions["mirrors-clang-format"] == f"v{locked['clang-format']}"
    assert "typos" in revisions


def test_versions_agree() -> None:
    assert loaded("CITATION.cff")["version"] == __version__
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert newest
    assert newest.group(1) == __version__


def test_the_bug_form_asks_for_the_doctor() -> None:
    form = loaded(".github/ISSUE_TEMPLATE/bug.yml")
    wanted = [field["attributes"]["label"] for field in form["body"] if field.get("validations", {}).get("required")]
    assert "vllm-sparq doctor --json" in wanted
    assert problem("vllm-sparq doctor --json") is None


def test_the_glossary_stays_short() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Words\n")[1].split("\n## ")[0]
    assert len([line for line in section.splitlines() if line.startswith("| ")]) - 1 <= 20
