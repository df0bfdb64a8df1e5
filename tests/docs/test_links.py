"""Links, paths and files that the documents mention exist."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, blocks, documents, files_and_folders, inline_code

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
SUFFIXES = ("py", "md", "cpp", "h", "sh", "yml", "yaml", "toml", "lock", "jsonl", "svg", "cff")
FILE = re.compile(rf"(?<![\w/.<>-])[\w./*-]+\.(?:{'|'.join(SUFFIXES)})\b")
OF_A_USER = {"prompts.jsonl", "gpu.jsonl", "ray.jsonl", "serve.jsonl", "engine.jsonl", "ops.jsonl"}
"""Files that a command reads or writes."""


def paths_in(text: str) -> set[str]:
    """What looks like a file of ours, in backticks and in blocks."""
    code = [*inline_code(text), *("\n".join(block) for block in blocks(text))]
    found = {match.group() for piece in code for match in FILE.finditer(piece)}
    top = {name.partition("/")[0] for name in files_and_folders()}
    folders = {piece.rstrip("/") for piece in inline_code(text) if "/" in piece and piece.partition("/")[0] in top}
    return {path for path in found | folders if " " not in path and "<" not in path and "::" not in path} - OF_A_USER


def exists(path: str) -> bool:
    """A path from the top, one with wildcards, or the bare name of a file of ours."""
    if path in files_and_folders():
        return True
    if "*" in path:
        return bool(fnmatch.filter(files_and_folders(), path))
    return "/" not in path and any(name.endswith(f"/{path}") for name in files_and_folders())


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = {target for target in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in target}
    gone = [target for target in targets if not (path.parent / target).exists()]
    assert not gone


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(path: Path) -> None:
    gone = sorted(one for one in paths_in(path.read_text(encoding="utf-8")) if not exists(one))
    assert not gone


def test_what_is_gone_is_found_out() -> None:
    assert paths_in("see `vllm_sparq/layout.py`, `docs/`, `org/name` and `gone.py`") == {
        "vllm_sparq/layout.py",
        "docs",
        "gone.py",
    }
    assert exists("layout.py")
    assert exists("vllm_sparq/ops/*/reference.py")
    assert not exists("gone.py")
    assert not exists("vllm_sparq/ops/*/gone.py")


def test_documents_speak_of_the_project_alone() -> None:
    """No path of somebody's machine."""
    for path in documents():
        assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/", path.read_text(encoding="utf-8")), path
