"""CNN/DailyMail as SparQ's authors ask it: articles of 4,000 to 8,000 characters, ROUGE-L against the highlights.

An output has as many tokens as the reference, 128 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import csv_lines, n_tokens, shuffled

SHUFFLE_SEED = 2353669
CHARACTERS = range(4000, 8001)
MAX_TOKENS = 128


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """Articles of the right length, in the authors' order."""
    rows = [row for row in csv_lines(files[0], ["id", "article", "highlights"]) if len(row["article"]) in CHARACTERS]
    order = shuffled(range(len(rows)), SHUFFLE_SEED)[: limits.n]
    return [_example(name, rows[i], i, tokenizer) for i in order]


def _example(name: str, row: dict[str, str], seed: int, tokenizer: Any) -> Example:
    prompt = f"Article: {row['article']}\nSummary:"
    return Example(
        task=name,
        prompt=prompt,
        answer=" " + row["highlights"],
        answers=(row["highlights"],),
        metric="rouge_l",
        n_prompt_tokens=len(tokenizer(prompt).input_ids),
        depth=None,
        seed=seed,
        max_tokens=max(1, min(MAX_TOKENS, n_tokens(tokenizer, row["highlights"]))),
        stop=(),
    )
