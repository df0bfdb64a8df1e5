"""The folder of an evaluation: a JSON line per example, from which a killed run goes on, and a line per cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.lines import check_out, make_folder, replace_lines
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.records import SCHEMA, append_records, origin_of, provenance, read_records
from vllm_sparq.benchmarks.quality.engine import Run
from vllm_sparq.benchmarks.tasks.generated import Example

FILES = ("examples.jsonl", "cells.jsonl")
"""Of lines, in the folder."""


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """Lines of examples by key, and cells by key; and dense's distributions at the tokens of forced answers.

    Args:
        folder: made if it is absent.
        run: what is the same for all engines.

    Raises:
        UsageError: the folder cannot be written, or holds a broken line.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        make_folder(folder)
        self.examples_path, self.cells_path = (folder / name for name in FILES)
        for path in (self.examples_path, self.cells_path):
            check_out(path)
        self.origin = provenance()
        self.identity = [fingerprint(run.model), run.dtype, run.engine_args, origin_of(self.origin)]
        # Files there go by their tokens alone, which another model or dtype may share.
        self.distributions = folder / "distributions" / digest(self.identity)
        make_folder(self.distributions)
        self.lines = {line["key"]: line for line in read_records(self.examples_path) if "key" in line}

    def key(self, method: Method, example: Example) -> str:
        """Of everything that decides an answer and its score."""
        return digest(self.identity, method.name, method.backend, method.options, asdict(example))

    def line(self, method: Method, example: Example, found: Mapping[str, Any]) -> dict[str, Any]:
        """The record of one example; ``found`` has its output and score, or why it was skipped."""
        return {
            "key": self.key(method, example),
            "prompt_sha": digest(example.prompt, example.prompt_ids, example.answer, example.seed),
            "task": example.task,
            "length": example.length,
            "depth": example.depth,
            "seed": example.seed,
            "method": method.name,
            "metric": example.metric,
            "prompt_tokens": example.n_prompt_tokens,
            "n_cut_tokens": example.n_cut_tokens,
            "answers": list(example.accepted),
            **found,
        }

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write them, and remember them."""
        append_records(self.examples_path, lines)
        self.lines |= {line["key"]: line for line in lines}

    def write_cells(self, records: Iterable[dict[str, Any]], identity: Any) -> list[dict[str, Any]]:
        """Put the records of this evaluation in place of those with the same key; keep the others.

        Returns:
            The records as written.
        """
        mine = []
        for record in records:
            key = digest(self.identity, identity, [record[name] for name in ("task", "length", "method", "options")])
            mine.append({"schema": SCHEMA, "key": key, **record, **self.origin})
        new = {cell["key"]: cell for cell in mine}
        replace_lines(self.cells_path, lambda cells: ({cell.get("key"): cell for cell in cells} | new).values())
        return mine
