"""Reading the documents: their files, code, links and tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def documents() -> tuple[Path, ...]:
    """Every Markdown file at the top, in docs/ and in .github/."""
    folders = (ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), (ROOT / ".github").rglob("*.md"))
    return tuple(sorted(path for folder in folders for path in folder))


@cache
def files_and_folders() -> frozenset[str]:
    """What is part of the project, relative to its top: known to git, or new and not ignored."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    files = {line for line in listed if (ROOT / line).exists()}
    folders = {str(parent) for line in files for parent in Path(line).parents}
    return frozenset(files | folders)


def blocks(text: str) -> Iterator[list[str]]:
    """The indented and fenced blocks of code, as lines without their indent."""
    lines: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line if fenced else line[4:])
            continue
        if lines and (line.strip() or not fenced):
            yield lines
            lines = []


def code_lines(text: str) -> Iterator[str]:
    """Lines of the blocks of code; a line that ends in a backslash is joined with the next, comments are cut off."""
    for block in blocks(text):
        for line in re.sub(r"\\\n\s*", "", "\n".join(block)).splitlines():
            command = re.split(r"(?:^|\s{2,})# ", line)[0].strip()
            if command:
                yield command


def inline_code(text: str) -> Iterator[str]:
    """What stands between single backticks, outside of blocks; a line break is a space."""
    prose = re.sub(r"^    .*$", "", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    for match in re.finditer(r"`([^`]+)`", prose):
        yield " ".join(match.group(1).split())


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row, without headings and rules."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        is_rule = bool(re.fullmatch(r"[|\s:-]+", line))
        is_heading = i + 1 < len(lines) and bool(re.fullmatch(r"\|[|\s:-]+", lines[i + 1]))
        if line.startswith("|") and not is_rule and not is_heading:
            yield [cell.strip() for cell in line.strip().strip("|").split(" | ")]
