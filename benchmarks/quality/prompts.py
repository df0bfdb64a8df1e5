"""The examples of an evaluation: generated ones of any length, the user's text in windows, sets of the papers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.quality.forms import ASKING, chat_overhead, forced, in_chat, uses_chat
from vllm_sparq.benchmarks.tasks.generated import TASKS, Example
from vllm_sparq.benchmarks.tasks.metrics import LIKELIHOOD
from vllm_sparq.benchmarks.tasks.papers import FAMILIES, PAPER_TASKS, Limits, load_paper_task
from vllm_sparq.benchmarks.tasks.papers.metrics import ALL_METRICS
from vllm_sparq.benchmarks.tasks.retrieval import RETRIEVAL
from vllm_sparq.console import UsageError

GENERATED: dict[str, Callable[..., Example]] = {**TASKS, **RETRIEVAL}
"""Name -> how an example is made."""

WITHOUT_HAYSTACK = ("repetition", "map", "few_shot")
"""Generated tasks that consist of what has to be found, so that a haystack of the user's has no place in them."""

TEXT = "text"
"""Language modelling on a text: bits per byte of the last tokens of its windows."""

MEASURED_TASKS = (TEXT, "wikitext")
"""Tasks whose answers are forced."""

SHARE_SCORED = 4
"""A window of the text is read up to its last quarter, which is forced upon the model and measured."""

MOST_SCORED = 256
"""Tokens of it at most, the last ones: each takes a decode step, and more windows say more than longer ends."""


def known_tasks() -> list[str]:
    """Every name that ``--tasks`` takes."""
    return [*GENERATED, TEXT, *PAPER_TASKS]


def short_names() -> list[str]:
    """The same, with families instead of their sets."""
    alone = [name for name, task in PAPER_TASKS.items() if task.family not in FAMILIES]
    return [*GENERATED, TEXT, *alone, *FAMILIES]


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse names that are no task, and metrics that are none: a task may be followed by one, as in squad:squad_f1.

    Raises:
        UsageError: the first of them, with the known ones.
    """
    for name in tasks:
        task, colon, metric = name.partition(":")
        if task not in known_tasks():
            raise UsageError(f"unknown task {task!r}: choose from {', '.join(short_names())}")
        if metric == LIKELIHOOD and task not in GENERATED:
            raise UsageError(f"task {task!r} has no one right answer to force: leave out {metric!r}")
        if colon and metric not in (*ALL_METRICS, LIKELIHOOD):
            known = ", ".join((*ALL_METRICS, LIKELIHOOD))
            raise UsageError(f"unknown metric {metric!r} of task {task!r}: choose from {known}")
        if colon and task in MEASURED_TASKS:
            raise UsageError(f"task {task!r} is measured in bits and has no other metric: leave out {metric!r}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to ask of every method.

    Attributes:
        model: a folder with a tokenizer.
        tasks: names.
        lengths: prompt tokens, of generated tasks and windows of text.
        n: examples of every task and length.
        seed: of the first example; the next ones count on.
        haystack: sentences of the user's, to hide facts in; None to write some.
        text: what task ``text`` is measured on; None for held-out text of the bundled model's corpus.
        data: folder with the papers' sets.
        chat: one of `forms.CHAT`, whether questions are asked in the model's chat template.
    """

    model: Path
    tasks: Sequence[str]
    lengths: Sequence[int]
    n: int
    seed: int = 0
    haystack: Sequence[str] | None = None
    text: str | None = None
    data: Path | None = None
    chat: str = "auto"

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def uses_chat(self) -> bool:
        """Whether questions are asked in the model's chat template."""
        return uses_chat(self.chat, self.tokenizer, [task.partition(":")[0] for task in self.tasks])

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)

    def examples(self, max_model_len: int) -> list[Example]:
        """All of them, task by task and length by length; depths of generated ones are spread evenly.

        Raises:
            UsageError: an unknown task, a set or a text that is missing or too short.
        """
        check_tasks(self.tasks)
        if self.chat == "on":
            assert self.uses_chat
        found: list[Example] = []
        for name in self.tasks:
            task, _, metric = name.partition(":")
            mine = self._of_task(task, max_model_len)
            if metric == LIKELIHOOD:
                mine = [forced(one, self.tokenizer) for one in mine]
            found += [replace(one, task=name, metric=metric) for one in mine] if metric else mine
        return found

    def _of_task(self, task: str, max_model_len: int) -> list[Example]:
        if task in PAPER_TASKS:
            limits = Limits(n=self.n, max_model_len=max_model_len)
            return load_paper_task(task, self.data, tokenizer=self.tokenizer, limits=limits)
        if task == TEXT:
            return [window for length in self.lengths for window in self.windows(length)]
        return [self.generated(task, length, i) for length in self.lengths for i in range(self.n)]

    def generated(self, task: str, length: int, i: int) -> Example:
        """The i-th example of a task and length."""
        more = {} if task in WITHOUT_HAYSTACK else {"given": self.haystack}
        in_template = task in ASKING and self.uses_chat
        overhead = chat_overhead(self.tokenizer) if in_template else 0
        depth = (i + 0.5) / self.n
        try:
            example = GENERATED[task](
                n_tokens=length - overhead, count_tokens=self.count_tokens, seed=self.seed + i, depth=depth, **more
            )
        except ValueError as error:  # too short for the task
            raise UsageError(f"task {task!r}: {error}; give larger --lengths") from None
        return replace(in_chat(example, self.tokenizer) if in_template else example, length=length)

    def windows(self, length: int) -> list[Example]:
        """Pieces of ``length`` tokens from the text, evenly spread over it; the end of each is scored."""
        n_scored = min(MOST_SCORED, length // SHARE_SCORED)
        return text_windows(self.tokenizer, self.text_ids, length=length, n=self.n, n_scored=n_scored)

    @cached_property
    def text_ids(self) -> list[int]:
        """Tokens of the text."""
        text = self.text
        if text is None:
            from vllm_sparq.benchmarks.tiny_model.corpus import documents

            text = "\n\n".join(documents(1 << 20, held_out=True))
        return tokens_of_text(self.tokenizer, text)


def tokens_of_text(tokenizer: Any, text: str) -> list[int]:
    """A text of any length in a model's tokens, without an opening one."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def text_windows(tokenizer: Any, ids: Sequence[int], *, length: int, n: int, n_scored: int) -> list[Example]:
    """``n`` windows of ``length`` tokens that do not overlap, evenly spread; the last ``n_scored`` of each are forced.

    A window opens as the model's prompts do: with a token of its own where the tokenizer puts one.

    Raises:
        UsageError: the text is too short for them, or they are.
    """
    head = opening(tokenizer)
    body = length - len(head)
    if n_scored < 1 or n_scored >= length - len(head):
        raise UsageError(
            f"windows of {length:,} tokens leave nothing to read or to score: give longer ones (--lengths)"
        )
    if len(ids) < n * body:
        raise UsageError(
            f"the text has {len(ids):,} tokens, {n} windows of {length:,} need {n * body:,}: give a longer text, "
            "fewer windows (--n) or shorter ones (--lengths)"
        )
    found = []
    for i in range(n):
        start = i * (len(ids) // n)
        window = [*head, *ids[start : start + body]]
        prompt, answer = window[:-n_scored], window[-n_scored:]
        found.append(
            Example(
                task=TEXT,
                prompt=tokenizer.decode(prompt),
                answer=tokenizer.decode(answer),
                n_prompt_tokens=len(prompt),
                depth=None,
                seed=i,
                max_tokens=n_scored,
                stop=(),
                metric="bits_per_byte",
                prompt_ids=tuple(prompt),
                answer_ids=tuple(answer),
                length=length,
            )
        )
    return found


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: its first token, or nothing, even if it knows such a token."""
    first = tokenizer.bos_token_id
    return [] if first is None or tokenizer("a").input_ids[:1] != [first] else [int(first)]


def read_text(path: Path) -> str:
    """A text file, or all .txt and .md files of a folder in order of their names.

    Raises:
        UsageError: nothing there, or nothing but white space.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        if not files:
            raise UsageError(f"no text in {path}: put .txt or .md files there")
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(f"no text at {path}: give a text file, or a folder of .txt and .md files")
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise UsageError(f"a text in {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UsageError(f"the text in {path} is empty")
    return text


def read_haystack(path: Path) -> list[str]:
    """The sentences of a text, each on one line.

    Raises:
        UsageError: there are none.
    """
    text = " ".join(read_text(path).split())
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence]
