"""Metrics against cases worked out by hand."""

from __future__ import annotations

import pytest

from vllm_sparq.benchmarks.common.optional import optional
from vllm_sparq.benchmarks.tasks.metrics import METRICS
from vllm_sparq.benchmarks.tasks.papers.metrics import ALL_METRICS
from vllm_sparq.console import UsageError


def score(metric: str, output: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    return ALL_METRICS[metric](output, answers, choices)


def test_metrics_of_generated_tasks_are_those_of_all() -> None:
    assert METRICS.items() <= ALL_METRICS.items()


@pytest.mark.parametrize(
    ("metric", "output", "answers", "expected"),
    [
        ("begins", " 123.", ("123",), 1),
        ("begins", "1234", ("123",), 0),
        ("begins", "x 123", ("123",), 0),
        ("prefix", "abXd", ("abcd",), 0.5),
        ("share", "It is 1, then 22", ("1", "22", "333", "4444"), 0.5),
        ("holds", "In the MILL, surely", ("mill", "barn"), 1),
        ("holds", "nowhere", ("mill", "barn"), 0),
        # SparQ's authors: case, an article and signs in front do not count, what follows does not either
        ("starts_with_alias", ' "The Denver Broncos" won', ("Carolina Panthers", "Denver Broncos"), 1),
        ("starts_with_alias", "It was the Denver Broncos", ("Denver Broncos",), 0),
        ("starts_with_alias", "anything", ("the",), 0),  # nothing is left of the answer, so nothing can start with it
        # SQuAD v1.1: case, punctuation, articles, white space
        ("squad_exact", "The  Denver Broncos!", ("denver broncos",), 1),
        ("squad_exact", "Denver", ("denver broncos",), 0),
        # 2 of 4 words said are right and 2 of 3 wanted: P = 1/2, R = 2/3, F = 4/7
        ("squad_f1", "blue cat or fish", ("the blue cat sat",), 4 / 7),
        ("squad_f1", "nothing of it", ("blue cat", "it"), 0.5),  # the better of two: P = 1/3, R = 1
        ("first_line_f1", "\nblue cat\nand so on and on", ("blue cat",), 1),
        # longest common subsequence "the cat on": of 4 and 5 words, P = 3/4, R = 3/5, F = 2/3
        ("rouge_l_unstemmed", "the cat sleeps on", ("the cat sat on mats",), 2 / 3),
        ("rouge_l_unstemmed", "cats run", ("cat runs",), 0),
        ("rouge_l", "cats run", ("cat runs",), 1),  # both stem to "cat run"
        ("rouge_l", "houses burning", ("house burns",), 1),
        ("first_line_rouge_l", "one two\nthree", ("one two",), 1),
        # passages 3 and 7 named, 3 is right
        ("retrieval", "Paragraph 3 or 7", ("Paragraph 3",), 0.5),
        ("retrieval", "none", ("Paragraph 3",), 0),
        # "return x" / "return y": one letter out, one in, of 16 letters: 1 - 2/16 = 0.875, in whole points 0.88
        ("edit_similarity", "# comment\n```\nreturn x\nmore", ("return y",), 0.88),
        ("edit_similarity", "", ("return y",), 0),
    ],
)
def test_by_hand(metric: str, output: str, answers: tuple[str, ...], expected: float) -> None:
    assert score(metric, output, *answers) == pytest.approx(expected)


def test_classification_divides_by_the_classes_named() -> None:
    choices = ("Date", "Date of birth", "Other location", "Number")
    assert score("classification", "Number", "Number", choices=choices) == 1
    assert score("classification", "Number or Date", "Number", choices=choices) == 0.5
    assert score("classification", "Date", "Number", choices=choices) == 0
    assert score("classification", "Date of birth", "Date of birth", choices=choices) == 1  # "Date" is a part of it
    assert score("classification", "Other location\nType: Number", "Other location", choices=choices) == 1


@pytest.mark.parametrize(
    "metric", ["rouge_l", "rouge_l_unstemmed", "squad_f1", "squad_exact", "share", "holds", "prefix"]
)
def test_a_right_answer_scores_one_and_an_empty_one_nothing(metric: str) -> None:
    assert score(metric, "a big house", "a big house") == 1
    assert score(metric, "", "a big house") == 0


def test_a_library_that_is_missing_is_named_with_its_remedy() -> None:
    assert optional("json", "this").loads("1") == 1
    with pytest.raises(UsageError, match="ROUGE needs no_such_library: pip install optuna rouge-score"):
        optional("no_such_library.inside", "ROUGE")
