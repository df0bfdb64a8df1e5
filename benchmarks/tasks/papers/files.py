"""Reading files of others: what is wrong is named by file and number, and examples are drawn as their authors draw."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vllm_sparq.console import UsageError

T = TypeVar("T")


def json_file(path: Path) -> Any:
    """A JSON file.

    Raises:
        UsageError: it is none, with the line where it breaks.
    """
    try:
        return json.loads(read(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
        raise UsageError(f"{path} is not JSON that can be used: {error}") from None


def json_lines(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty, every object with these fields.

    Raises:
        UsageError: a line that is none, by file and number.
    """
    for number, line in enumerate(read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}:{number} is not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is not a JSON object but {type(row).__name__}")
        check_fields(row, fields, f"{path}:{number}")
        yield number, row


def csv_lines(path: Path, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a file of comma-separated values with a header.

    Raises:
        UsageError: a column is missing, or a row is cut short; by file and line.
    """
    csv.field_size_limit(sys.maxsize)  # an article is longer than the default
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        check_fields(dict.fromkeys(rows.fieldnames or (), ""), fields, f"{path}:1")
        for row in rows:
            if any(row[name] is None for name in fields):
                raise UsageError(f"{path}:{rows.line_num} ends before its columns {', '.join(fields)} are filled")
            yield row


def check_fields(row: Any, fields: Sequence[str], where: str) -> None:
    """Refuse an object without these fields.

    Raises:
        UsageError: one of them is missing.
    """
    missing = [name for name in fields if not isinstance(row, dict) or name not in row]
    if missing:
        raise UsageError(f"{where} has no {missing[0]!r}: expected are {', '.join(fields)}")


def read(path: Path) -> str:
    """Text of a UTF-8 file.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line} is not UTF-8: {error.reason}") from None


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    """In the order in which Hugging Face `datasets` shuffles with that seed."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def n_tokens(tokenizer: Any, text: str) -> int:
    """Of a text that goes on with another: without the tokenizer's opening token."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)
