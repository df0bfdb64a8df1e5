"""The other generated retrieval tasks: lengths, depths, answers. No model and no torch."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tasks.retrieval import N_NEEDLE_VALUES, RETRIEVAL

WHERE = {
    "needle_keys": lambda one: tasks.question(one.prompt.split()[-2]) + one.answer,
    "needle_values": lambda one: one.answers[0],
    "passkey": lambda one: f"The pass key is{one.answer}. Remember it.",
    "quote": lambda one: one.prompt.rpartition('To quote the text: "')[2] + one.answer,
    "qa": lambda one: f"{re.findall(r'Where does (.+) keep', one.prompt)[0]} keeps the",
}
"""Task -> text that stands at the example's depth, once."""


def count_tokens(text: str) -> int:
    """A stand-in for a tokenizer: pieces of at most three letters, single digits and signs, and a <bos>."""
    return 1 + len(re.findall(r" ?[a-zA-Z]{1,3}|\s|\d|[^\w\s]", text))


def make(task: str, **given: Any) -> tasks.Example:
    return RETRIEVAL[task](**{"n_tokens": 1000, "count_tokens": count_tokens, "seed": 1, **given})


@pytest.mark.parametrize("task", RETRIEVAL)
def test_a_seed_decides_an_example_and_its_length_is_the_one_asked_for(task: str) -> None:
    assert make(task) == make(task)
    for seed in range(5):
        example = make(task, seed=seed)
        assert example.task == task
        assert 988 <= example.n_prompt_tokens == count_tokens(example.prompt) <= 1000
        assert example.prompt == example.prompt.strip()
        assert example.answer.startswith(" ")
        assert not any(stop in example.answer for stop in example.stop)


@pytest.mark.parametrize("task", WHERE)
@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.1), (0.5, 0.4, 0.6), (1.0, 0.85, 1.0)])
def test_the_answer_lies_at_the_depth_asked_for(task: str, depth: float, low: float, high: float) -> None:
    example = make(task, n_tokens=3000, depth=depth)
    context = example.prompt.rsplit("\n", 2 if task == "qa" else 1)[0]
    text = WHERE[task](example)
    assert context.count(text) == 1
    assert low <= context.index(text) / len(context) <= high


@pytest.mark.parametrize("task", RETRIEVAL)
def test_right_answers_score_one_and_wrong_ones_nothing(task: str) -> None:
    example = make(task)
    assert tasks.score(example, example.answer + ".") == 1
    assert tasks.score(example, " nothing of the kind") == 0
    assert tasks.score(example, "") == 0


def test_of_several_values_each_counts() -> None:
    example = make("needle_values")
    assert len(set(example.answers)) == N_NEEDLE_VALUES
    assert tasks.score(example, f"{example.answers[2]} and {example.answers[0]}") == 2 / N_NEEDLE_VALUES
    assert all(f"is {value}." in example.prompt for value in example.answers)


def test_what_was_found_elsewhere_does_not_end_a_sentence_twice() -> None:
    example = make("passkey", given=["Is it so?", "It is!", "Yes."])
    assert "?." not in example.prompt
    assert "!." not in example.prompt
