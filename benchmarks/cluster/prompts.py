"""Prompts of an offline run: from a JSONL or Parquet file, or generated; always with an id, a length and a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.console import UsageError

READ_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request.

    Attributes:
        id: unique in the data set.
        prompt: text.
        max_tokens: of the answer.
        seed: of the random numbers that sample it; unused by greedy decoding.
    """

    id: str
    prompt: str
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over all prompts found: their number, and a digest that tells this data set from another one."""

    n_rows: int
    digest: str


Source = Callable[[], Iterator[Prompt]]
"""Reads all prompts, in the same order each time, never all of them into memory."""


def from_file(path: Path, *, max_tokens: int, seed: int) -> Source:
    """Prompts of a ``.jsonl`` or ``.parquet`` file.

    A row has ``prompt`` and may have ``id`` (default: its number), ``max_tokens`` and ``seed`` (default: ``seed`` plus
    its number).

    Raises:
        UsageError: no such file, or another kind of file; when read, a row that is not as above.
    """
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UsageError(f"--data {path}: give a file that ends in {' or '.join(readers)}")
    if not path.is_file():
        raise UsageError(f"--data {path}: there is no such file")

    def read() -> Iterator[Prompt]:
        for number, row in enumerate(readers[path.suffix](path)):
            where = f"--data {path}, row {number + 1}"
            text = row.get("prompt") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text:
                raise UsageError(f"{where}: there is no text under the key 'prompt'")
            try:
                yield Prompt(
                    id=str(number if row.get("id") is None else row["id"]),
                    prompt=text,
                    max_tokens=int(row.get("max_tokens") or max_tokens),
                    seed=seed + number if row.get("seed") is None else int(row["seed"]),
                )
            except (TypeError, ValueError) as error:
                raise UsageError(f"{where}: max_tokens and seed must be whole numbers ({error})") from None

    return read


def generated(model: Path, *, n: int, n_tokens: int, max_tokens: int, seed: int) -> Source:
    """``n`` needle questions of about ``n_tokens`` tokens each, drawn from ``seed``.

    Raises:
        UsageError: when read, the model's folder has no tokenizer, or ``n_tokens`` is too short for a question.
    """

    def read() -> Iterator[Prompt]:
        tokenizer = _tokenizer(model)
        for i in range(n):
            try:
                example = tasks.make_example(
                    "needle",
                    n_tokens=n_tokens,
                    count_tokens=lambda text: len(tokenizer.encode(text).ids),
                    seed=seed + i,
                    depth=(i + 0.5) / n,
                )
            except ValueError as error:
                raise UsageError(f"--input-len {n_tokens}: {error}") from None
            yield Prompt(id=str(i), prompt=example.prompt, max_tokens=max_tokens, seed=seed + i)

    return read


def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    remedy = "give a folder with config.json, weights and tokenizer, or prompts of your own with --data"
    if not path.is_file():
        raise UsageError(f"--model {model}: there is no tokenizer.json in it; {remedy}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # a bare one, whatever is wrong with the file
        raise UsageError(f"--model {model}: its tokenizer.json cannot be used ({error}); {remedy}") from None


def survey(prompts: Iterable[Prompt]) -> Survey:
    """Count and digest.

    Raises:
        UsageError: no rows, or two rows with the same id.
    """
    digest, ids = hashlib.sha256(), set()
    for prompt in prompts:
        if prompt.id in ids:
            raise UsageError(f"two prompts have the id {prompt.id!r}: give every row an id of its own, or none to any")
        ids.add(prompt.id)
        digest.update(json.dumps([prompt.id, prompt.prompt, prompt.max_tokens, prompt.seed]).encode())
    if not ids:
        raise UsageError("the data set holds no prompts")
    return Survey(n_rows=len(ids), digest=digest.hexdigest()[:16])


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:  # not text, not JSON
                    raise UsageError(f"--data {path}, line {number} is not JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"--data {path} is not a Parquet file: {error}") from None
    known = [name for name in ("id", "prompt", "max_tokens", "seed") if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=READ_ROWS, columns=known):
        yield from batch.to_pylist()
