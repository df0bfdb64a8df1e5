"""Metrics of the papers' tasks, on well-kept libraries: `transformers` for SQuAD, `rouge_score`, `nltk`.

All take an output, the accepted answers and the choices, and give 0.0 to 1.0; with several answers the best counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from vllm_sparq.benchmarks.common.optional import optional
from vllm_sparq.benchmarks.tasks.metrics import METRICS, Metric

AROUND = re.compile(r"^[\s\"'_.,]*(?:(?:the|an|a) )?|[\s\"'_.,]*$")
"""What SparQ's authors ignore around an answer: blanks, punctuation, an article in front."""


def best(score: Callable[[str, str], float]) -> Metric:
    """A metric from a score of one output against one answer."""

    def metric(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max(score(output, answer) for answer in answers)

    return metric


def starts_with_alias(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the output starts with an answer, case and surroundings aside (SparQ: SQuAD and TriviaQA)."""
    said = AROUND.sub("", output.lower())
    wanted = [AROUND.sub("", answer.lower()) for answer in answers]
    return float(any(said.startswith(answer) for answer in wanted if answer))


def squad_exact(output: str, answer: str) -> float:
    """Equality after SQuAD's normalisation: case, punctuation, articles, white space."""
    from transformers.data.metrics.squad_metrics import compute_exact

    return float(compute_exact(answer, output))


def squad_f1(output: str, answer: str) -> float:
    """F1 of the words that are left after SQuAD's normalisation (LongBench's ``qa_f1``)."""
    from transformers.data.metrics.squad_metrics import compute_f1

    return float(compute_f1(answer, output))


def first_line_f1(output: str, answer: str) -> float:
    """The same of the first line (LongBench's few-shot sets)."""
    return squad_f1(first_line(output), answer)


@cache
def _rouge(stem: bool) -> Any:
    return optional("rouge_score.rouge_scorer", "ROUGE-L").RougeScorer(["rougeL"], use_stemmer=stem)


def rouge_l(output: str, answer: str) -> float:
    """F of the longest common subsequence of stemmed words (SparQ: CNN/DailyMail)."""
    return float(_rouge(True).score(answer, output)["rougeL"].fmeasure)


def rouge_l_unstemmed(output: str, answer: str) -> float:
    """The same of words as they stand: LongBench does not stem.

    LongBench computes it with another package, which does not fold case or drop punctuation; figures differ slightly.
    """
    return float(_rouge(False).score(answer, output)["rougeL"].fmeasure)


def first_line_rouge_l(output: str, answer: str) -> float:
    """The same of the first line (LongBench: samsum)."""
    return rouge_l_unstemmed(first_line(output), answer)


def classification(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 / number of class names in the first line, if the right one is among them (LongBench: trec).

    Names that are a part of the right one do not count against it.
    """
    said = first_line(output)
    scores = [0.0]
    for answer in answers:
        named = [name for name in choices if name in said and (name == answer or name not in answer)]
        scores.append(1 / len(named) if answer in named else 0.0)
    return max(scores)


def retrieval(output: str, answer: str) -> float:
    """Share of the numbers in the output that are the paragraph's (LongBench: passage_retrieval_en)."""
    wanted = re.findall(r"Paragraph (\d+)", answer)
    numbers = re.findall(r"\d+", output)
    return numbers.count(wanted[0]) / len(numbers) if numbers and wanted else 0.0


def edit_similarity(output: str, answer: str) -> float:
    """Of the first line of code: 1 - insertions and deletions / length of both (LongBench: lcc, repobench-p).

    Lines with a backtick, # or // are not taken for code. Rounded to whole points, as the official ratio is.
    """
    edit_distance = optional("nltk.metrics.distance", "edit similarity").edit_distance
    lines = output.lstrip("\n").split("\n")
    line = next((one for one in lines if not ("`" in one or "#" in one or "//" in one)), "")
    both = len(line) + len(answer)
    if not line or not answer:
        return 0.0
    distance = int(edit_distance(line, answer, substitution_cost=2))
    return round(100 * (1 - distance / both)) / 100


def first_line(output: str) -> str:
    """What is left of an output that goes on after its answer."""
    return output.lstrip("\n").split("\n")[0]


ALL_METRICS: dict[str, Metric] = {
    **METRICS,
    "starts_with_alias": starts_with_alias,
    "squad_exact": best(squad_exact),
    "squad_f1": best(squad_f1),
    "first_line_f1": best(first_line_f1),
    "rouge_l": best(rouge_l),
    "rouge_l_unstemmed": best(rouge_l_unstemmed),
    "first_line_rouge_l": best(first_line_rouge_l),
    "classification": classification,
    "retrieval": best(retrieval),
    "edit_similarity": best(edit_similarity),
}
"""Name -> metric of generated text, those of the generated tasks included."""
