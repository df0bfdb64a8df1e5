"""What an output is worth: one row of `METRICS` each. Standard library only.

A metric compares an output with the accepted (or wanted) answers, given the choices that there were, and gives 0.0 to
1.0, more being better. Metrics of
the papers' own tasks stand in `paper_tasks.metrics`; bits per byte is measured and not compared, see `forced`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str], Sequence[str]], float]


def common_prefix(a: str, b: str) -> int:
    """Characters before the first mismatch."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def begins_with_answer(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1.0 when the output begins with an answer as whole words. Leading spaces do not count, nor does what follows."""
    output = output.strip()
    return float(any(output.startswith(a) and not output[len(a) :][:1].isalnum() for a in map(str.strip, answers)))


def characters_before_mismatch(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Characters before the first mismatch, as a fraction of the first answer's."""
    answer = answers[0].strip()
    return common_prefix(output.strip(), answer) / len(answer)


def share_of_answers(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """How many of the answers the output holds, case aside, as RULER counts them (arXiv 2404.06654)."""
    said = output.lower()
    return sum(answer.strip().lower() in said for answer in answers) / len(answers)


def holds_an_answer(output: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1.0 when the output holds any of the answers, case aside."""
    said = output.lower()
    return float(any(answer.strip().lower() in said for answer in answers))


METRICS: dict[str, Metric] = {
    "begins": begins_with_answer,
    "prefix": characters_before_mismatch,
    "share": share_of_answers,
    "holds": holds_an_answer,
}
"""Name -> metric of generated text."""

LIKELIHOOD = "likelihood"

MEASURED = {
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
    LIKELIHOOD: "bits of the right answer",
}
"""Metrics that the engine measures by forcing the answer, with their unit; less is better."""
