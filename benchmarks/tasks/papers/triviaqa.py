"""TriviaQA (rc, Wikipedia pages) as SparQ's authors ask it: no shots, one page of 4,000 to 8,000 characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import check_fields, json_file, read, shuffled
from vllm_sparq.benchmarks.tasks.papers.squad import example
from vllm_sparq.console import UsageError

SEED, SHUFFLE_SEED = 2751584, 487523
CHARACTERS = range(4000, 8001)
N_SHOTS_DRAWN = 7  # drawn and not used; they move the seed on


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """Questions that have a page of the right length, in the authors' order.

    Raises:
        UsageError: an entry that is not as in TriviaQA's files, or a page that is not in the folder.
    """
    questions, pages = files
    document = json_file(questions)
    check_fields(document, ["Data"], str(questions))
    rng = np.random.RandomState(SEED)
    rows = document["Data"]
    found: list[tuple[str, list[str]]] = []
    for i, row in enumerate(rows):
        where = f"{questions}: Data[{i}]"
        check_fields(row, ["Question", "Answer", "EntityPages"], where)
        check_fields(row["Answer"], ["Aliases"], f"{where}.Answer")
        texts = [_page(pages / entry["Filename"], where) for entry in row["EntityPages"]]
        fitting = [text for text in texts if len(text) in CHARACTERS]
        if fitting and row["Answer"]["Aliases"]:
            rng.choice(len(rows), N_SHOTS_DRAWN)
            page = fitting[rng.randint(len(fitting))]
            prompt = f"{page}\nQuestion: {row['Question']}\nAnswer:"
            found.append((prompt, row["Answer"]["Aliases"]))
    order = shuffled(range(len(found)), SHUFFLE_SEED)[: limits.n]
    return [example(name, *found[i], i, tokenizer) for i in order]


def _page(path: Path, where: str) -> str:
    if not path.is_file():
        raise UsageError(f"{where} names the page {path}, which is not there: take the evidence archive whole")
    return read(path)
