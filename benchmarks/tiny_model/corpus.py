"""Text found on a Debian machine: manual pages and the docstrings of Python's standard library.

Only training uses it. What is found depends on the machine's packages, so the weights are reproducible from a seed
on one image and merely similar elsewhere.
"""

from __future__ import annotations

import ast
import gzip
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from vllm_sparq.console import UsageError

MANUALS = Path("/usr/share/man")
HELD_OUT_EVERY = 20
MIN_CHARS = 400  # shorter documents are mostly redirections to other pages

ESCAPES = (
    (re.compile(r"\\f(\[[^]]*\]|\([A-Z]{2}|[A-Z0-9])"), ""),  # fonts
    (re.compile(r"\\s[+-]?\d+"), ""),  # sizes
    (re.compile(r"\\\*?\((aq|lq|rq|cq|oq|dq)|\\\[(aq|lq|rq|cq|oq|dq)\]"), "'"),
    (re.compile(r"\\\((em|en|hy|mi)"), "-"),
    (re.compile(r"\\\((bu|co|rg)|\\\*?\(..|\\\*?\[[^]]*\]|\\[&|^/,:cd%]"), ""),
    (re.compile(r"\\([-. '`])"), r"\1"),
    (re.compile(r"\\[e\\]"), r"\\"),
)
SPOKEN = re.compile(r"^\.\s*(B|I|BR|BI|IB|IR|RB|RI|SH|SS|SM|Nm|Sh|Ss|Nd|Ar|Fl|Pa|Xr|Cm)\b\s*(.*)$")


def plain_manual(roff: str) -> str:
    """The words of a manual page: macros that carry text are unwrapped, other requests dropped."""
    lines = []
    for line in roff.splitlines():
        spoken = SPOKEN.match(line)
        if spoken:
            line = spoken.group(2).replace('"', "")
        elif line[:1] in (".", "'"):
            continue
        for pattern, replacement in ESCAPES:
            line = pattern.sub(replacement, line)
        lines.append(line.rstrip())
    return "\n".join(lines)


def manual_pages(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Name and plain text of the English manual pages of one side of the split."""
    for path in sorted(MANUALS.glob("man[1-8]/*.gz")):
        if path.is_file() and is_held_out(path.name) == held_out:
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            yield path.name, plain_manual(text)


def docstrings(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Module name and joined docstrings of the standard library's modules of one side of the split."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "/test" in name or name.startswith("test/"):
            continue
        if is_held_out(name) != held_out:
            continue  # before it is parsed, which takes long
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # template files and files of other encodings
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield name, "\n\n".join(text for text in found if text)


def is_held_out(name: str) -> bool:
    """Whether a document is kept out of training, decided by its name alone."""
    return zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0


def documents(max_bytes: int, *, held_out: bool) -> list[str]:
    """Distinct documents of ASCII text, up to `max_bytes` in total: docstrings first, then manual pages.

    The order among manual pages is that of a hash of their names, so that a budget takes a fair sample of them.
    """
    pages = sorted(manual_pages(held_out=held_out), key=lambda page: zlib.crc32(page[0].encode()[::-1]))
    kept: list[str] = []
    seen: set[int] = set()
    n_bytes = 0
    for _, text in [*docstrings(held_out=held_out), *pages]:
        text = re.sub(r"\n{3,}", "\n\n", text.encode("ascii", "ignore").decode()).strip()
        # Families of pages that differ in a name only would take up much of the budget: compare a slice.
        print_of = zlib.crc32(text[200:400].encode())
        if len(text) < MIN_CHARS or print_of in seen:
            continue
        seen.add(print_of)
        text = text[:60_000]
        if n_bytes + len(text) > max_bytes:
            break
        n_bytes += len(text)
        kept.append(text)
    if not kept:
        raise UsageError(f"found no text: neither manual pages in {MANUALS} nor docstrings of the standard library")
    return kept
