"""SQuAD v1.1 as SparQ's authors ask it: one shot, the right paragraph among seven others.

Shots come from the same paragraph first. Of an answer that is right at its start all counts. The order of examples and
the paragraphs beside the right one are drawn as the authors draw them; the instruction is in our words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import check_fields, json_file, n_tokens, shuffled

SEED, SHUFFLE_SEED = 82735235, 945237
N_CONFUSION = 7
N_SHOTS, N_SHOTS_DRAWN = 1, 5  # the authors draw five and use the first
MAX_TOKENS, SPARE_TOKENS = 30, 5


@dataclass(frozen=True)
class Row:
    """One question, with the paragraph that answers it."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]

    @property
    def background(self) -> str:
        return f"Title: {self.title}. Background: {self.context}"

    def asked(self, answer: str = "") -> str:
        return f"Question: {self.question}\nAnswer:{answer}"


def rows_of(path: Path) -> list[Row]:
    """All questions, in the file's order.

    Raises:
        UsageError: what is not as in SQuAD v1.1, by its place.
    """
    document = json_file(path)
    check_fields(document, ["data"], str(path))
    rows = []
    for i, article in enumerate(document["data"]):
        check_fields(article, ["title", "paragraphs"], f"{path}: data[{i}]")
        for j, paragraph in enumerate(article["paragraphs"]):
            check_fields(paragraph, ["context", "qas"], f"{path}: data[{i}].paragraphs[{j}]")
            for k, qa in enumerate(paragraph["qas"]):
                check_fields(qa, ["id", "question", "answers"], f"{path}: data[{i}].paragraphs[{j}].qas[{k}]")
                answers = tuple(answer["text"] for answer in qa["answers"])
                title = article["title"].replace("_", " ")
                rows.append(Row(qa["id"], title, paragraph["context"], qa["question"], answers))
    return rows


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """Examples in the authors' order."""
    rows = rows_of(files[0])
    rng = np.random.RandomState(SEED)
    by_context = defaultdict(list)
    for row in rows:
        by_context[row.context].append(row)
    backgrounds = sorted({row.background for row in rows})
    prompts = []
    for row in rows:  # all of them, so that the draws do not depend on how many are wanted
        contexts = [row.background, *(backgrounds[i] for i in rng.choice(len(backgrounds), N_CONFUSION))]
        rng.shuffle(contexts)
        same = [other for other in by_context[row.context] if other.id != row.id]
        rng.shuffle(same)  # type: ignore[arg-type]  # NumPy shuffles any list in place
        others = [rows[i] for i in rng.choice(len(rows), N_SHOTS_DRAWN + 1) if rows[i].id != row.id]
        shots = (same + others)[:N_SHOTS]
        lines = [shot.asked(" " + min(shot.answers, key=len)) for shot in shots]
        prompts.append("\n".join([*contexts, f"Questions about {row.title}:", *lines, row.asked()]))
    order = shuffled(range(len(rows)), SHUFFLE_SEED)[: limits.n]
    return [example(name, prompts[i], rows[i].answers, i, tokenizer) for i in order]


def example(name: str, prompt: str, answers: Sequence[str], seed: int, tokenizer: Any) -> Example:
    """A question whose answer has a few tokens to spare."""
    longest = max(n_tokens(tokenizer, " " + answer) for answer in answers)
    return Example(
        task=name,
        prompt=prompt,
        answer=" " + answers[0],
        answers=tuple(answers),
        metric="starts_with_alias",
        n_prompt_tokens=len(tokenizer(prompt).input_ids),
        depth=None,
        seed=seed,
        max_tokens=min(MAX_TOKENS, longest + SPARE_TOKENS),
        stop=("\n",),
    )
