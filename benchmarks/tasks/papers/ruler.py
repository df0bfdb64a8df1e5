"""RULER (arXiv 2404.06654), thirteen tasks: what its generator wrote for the model's tokenizer and a length.

Every line has the prompt (``input``) and the answers (``outputs``). The share of answers that an output holds counts;
of a question's answers one is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import json_lines
from vllm_sparq.console import UsageError

MAX_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""First part of a task's name -> tokens of its output."""


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """The first examples of a task, in the file's order.

    Raises:
        UsageError: a malformed line, or one without answers.
    """
    kind = name.removeprefix("ruler_").partition("_")[0]
    found: list[Example] = []
    for number, row in json_lines(files[0], ["input", "outputs"]):
        if len(found) == limits.n:
            break
        answers = row["outputs"]
        if not isinstance(answers, list) or not answers:
            raise UsageError(f"{files[0]}:{number}: 'outputs' must be a list of answers, got {answers!r}")
        prompt = row["input"]
        ending = row.get("answer_prefix", "")  # newer generators keep the beginning of the answer apart
        prompt += "" if prompt.endswith(ending) else ending
        found.append(
            Example(
                task=name,
                prompt=prompt,
                answer=str(answers[0]),
                answers=tuple(map(str, answers)),
                metric="holds" if kind == "qa" else "share",
                n_prompt_tokens=len(tokenizer(prompt).input_ids),
                depth=None,
                seed=number,
                max_tokens=MAX_TOKENS[kind],
                stop=(),
            )
        )
    return found
