"""The tasks of the papers, from local files in the formats in which they are distributed. Nothing is downloaded.

A family is a file with one loader; a set is a row of `PAPER_TASKS`, which also says which files it needs. Seeds,
lengths and metrics are those of the papers' own code where it could be read (SparQ's authors for SQuAD, TriviaQA,
CNN/DailyMail, WikiText-103 and Shakespeare; LongBench and RULER their own); instructions in words are ours unless they
come with the files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example, words_of
from vllm_sparq.console import UsageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a set is wanted.

    Attributes:
        n: examples.
        max_model_len: tokens of prompt and answer together, for sets whose definition cuts prompts.
    """

    n: int
    max_model_len: int


@dataclass(frozen=True, kw_only=True)
class PaperTask:
    """A row of the table.

    Attributes:
        family: module of this package whose `load` makes the examples.
        files: what it reads, relative to ``--data``.
        about: which distribution the files come from.
    """

    family: str
    files: tuple[str, ...]
    about: str


LONGBENCH = words_of(
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum "
    "passage_retrieval_en lcc repobench-p"
)
"""The fifteen English sets that the benchmark paper (arXiv 2407.01527) uses; passage_count is not among them."""

RULER = words_of(
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery vt cwe fwe qa_1 qa_2"
)
"""RULER's thirteen (arXiv 2404.06654)."""

LONGBENCH_CONFIG = ("longbench/config/dataset2prompt.json", "longbench/config/dataset2maxlen.json")

PAPER_TASKS: dict[str, PaperTask] = {
    "squad": PaperTask(family="squad", files=("squad/dev-v1.1.json",), about="SQuAD v1.1, development set"),
    "triviaqa": PaperTask(
        family="triviaqa",
        files=("triviaqa/qa/wikipedia-dev.json", "triviaqa/evidence/wikipedia"),
        about="TriviaQA rc: questions and the folder of Wikipedia pages",
    ),
    "cnn_dailymail": PaperTask(
        family="cnn_dailymail",
        files=("cnn_dailymail/validation.csv",),
        about="CNN/DailyMail 3.0.0 with columns id, article, highlights",
    ),
    "wikitext": PaperTask(
        family="wikitext", files=("wikitext/wiki.train.raw",), about="WikiText-103 raw, training set"
    ),
    "shakespeare": PaperTask(family="shakespeare", files=("shakespeare/input.txt",), about="tiny Shakespeare, whole"),
    **{
        f"longbench_{name}": PaperTask(
            family="longbench", files=(f"longbench/data/{name}.jsonl", *LONGBENCH_CONFIG), about="LongBench v1"
        )
        for name in LONGBENCH
    },
    **{
        f"ruler_{name}": PaperTask(
            family="ruler", files=(f"ruler/{name}/validation.jsonl",), about="what RULER's generator writes"
        )
        for name in RULER
    },
}
"""Name of a task -> where it comes from."""

FAMILIES = {"longbench": LONGBENCH, "ruler": RULER}
"""Names that stand for all sets of a family."""


def expand(names: Sequence[str]) -> list[str]:
    """Task names, with families taken apart."""
    return [
        task for name in names for task in ([f"{name}_{one}" for one in FAMILIES[name]] if name in FAMILIES else [name])
    ]


def load_paper_task(name: str, data: Path | None, *, tokenizer: Any, limits: Limits) -> list[Example]:
    """The first ``limits.n`` examples of a set, in the order of its definition.

    Raises:
        UsageError: files that are missing, by name; a malformed line, by file and number; nothing of use in them.
    """
    task = PAPER_TASKS[name]
    wanted = " and ".join(task.files)
    if data is None:
        raise UsageError(f"task {name!r} reads local files: give --data DIR with {wanted} ({task.about})")
    missing = [file for file in task.files if not (data / file).exists()]
    if missing:
        raise UsageError(
            f"task {name!r} needs {data / missing[0]}, which is not there; expected are {wanted} ({task.about})"
        )
    module = importlib.import_module(f"vllm_sparq.benchmarks.tasks.papers.{task.family}")
    load: Callable[..., list[Example]] = module.load
    found = load(name, [data / file for file in task.files], tokenizer=tokenizer, limits=limits)
    if not found:
        raise UsageError(f"task {name!r}: {data / task.files[0]} holds nothing that its definition takes")
    return found
