"""LongBench v1 (arXiv 2308.14508), fifteen English sets: its prompts, its output lengths, its metrics.

Prompts and lengths come from the files that are distributed with the data. A prompt that does not fit into the model's
context loses its middle, as LongBench has it; how much is kept with the example, and counted in the table. No chat
template is applied: of a chat model, the sets on which LongBench applies none either can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import LONGBENCH, Limits
from vllm_sparq.benchmarks.tasks.papers.files import check_fields, json_file, json_lines
from vllm_sparq.console import UsageError

METRIC = {
    **dict.fromkeys(LONGBENCH[:6], "squad_f1"),
    "gov_report": "rouge_l_unstemmed",
    "qmsum": "rouge_l_unstemmed",
    "multi_news": "rouge_l_unstemmed",
    "trec": "classification",
    "triviaqa": "first_line_f1",
    "samsum": "first_line_rouge_l",
    "passage_retrieval_en": "retrieval",
    "lcc": "edit_similarity",
    "repobench-p": "edit_similarity",
}
"""Set -> metric."""

ENDS_WITH_ITS_LINE = ("samsum",)
"""Sets whose generation stops at the first new line."""


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """The first examples of a set, in the file's order.

    Raises:
        UsageError: a malformed line; prompts without a place for what the lines hold.
    """
    data, prompts, lengths = files
    short = name.removeprefix("longbench_")
    templates, max_tokens = json_file(prompts), json_file(lengths)
    check_fields(templates, [short], str(prompts))
    check_fields(max_tokens, [short], str(lengths))
    found: list[Example] = []
    for number, row in json_lines(data, ["input", "context", "answers"]):
        if len(found) == limits.n:
            break
        try:
            prompt = templates[short].format(**row)
        except (KeyError, IndexError) as error:
            raise UsageError(f"{prompts}: the prompt of {short} asks for {error}, {data}:{number} has none") from None
        found.append(_example(name, prompt, row, number, max_tokens[short], tokenizer, limits))
    return found


def _example(
    name: str, prompt: str, row: dict[str, Any], number: int, max_tokens: int, tokenizer: Any, limits: Limits
) -> Example:
    short = name.removeprefix("longbench_")
    ids = tokenizer(prompt).input_ids
    room = limits.max_model_len - max_tokens
    n_cut = max(0, len(ids) - room)
    if n_cut:
        half = room // 2
        ids = [*ids[:half], *ids[len(ids) - (room - half) :]]
    return Example(
        task=name,
        prompt=prompt,
        answer=row["answers"][0],
        answers=tuple(row["answers"]),
        choices=tuple(row.get("all_classes") or ()),
        metric=METRIC[short],
        n_prompt_tokens=len(ids),
        depth=None,
        seed=number,
        max_tokens=max_tokens,
        stop=("\n",) if short in ENDS_WITH_ITS_LINE else (),
        prompt_ids=tuple(ids),
        n_cut_tokens=n_cut,
    )
