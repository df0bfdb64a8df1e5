"""The generated tasks: determinism, lengths, answers, scores. No model and no torch."""

import re
import string
from dataclasses import replace

import pytest

from vllm_sparq.benchmarks.tasks import generated as tasks

LENGTHS = (300, 512, 1024, 4000)


def count_tokens(text: str) -> int:
    """A stand-in for a tokenizer: pieces of at most three letters, single digits and signs, and a <bos>."""
    return 1 + len(re.findall(r" ?[a-zA-Z]{1,3}|\s|\d|[^\w\s]", text))


def make(task: str, **kwargs) -> tasks.Example:
    return tasks.make_example(task, **{"n_tokens": 512, "count_tokens": count_tokens, "seed": 1, **kwargs})


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_seed_decides_an_example(task):
    assert make(task) == make(task)
    assert make(task).prompt != make(task, seed=2).prompt


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_prompts_have_the_length_asked_for(task, n_tokens):
    for seed in range(5):
        example = make(task, n_tokens=n_tokens, seed=seed)
        assert example.task == task
        assert example.n_prompt_tokens == count_tokens(example.prompt)
        assert n_tokens - 12 <= example.n_prompt_tokens <= n_tokens


@pytest.mark.parametrize("task", tasks.TASKS)
def test_too_short_a_length_is_refused_with_numbers(task):
    with pytest.raises(ValueError, match=r"n_tokens=4 .* shortest prompt has \d+ tokens"):
        make(task, n_tokens=4)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'haystack'.*needle.*map"):
        make("haystack")


def test_a_depth_outside_of_the_context_is_refused():
    with pytest.raises(ValueError, match=r"between 0.0 and 1.0, got 1.5"):
        make("needle", depth=1.5)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_prompt_and_answer_join_at_a_space(task):
    example = make(task)
    assert example.prompt == example.prompt.strip()
    assert example.answer.startswith(" ")
    assert example.answer.strip() == example.answer[1:]
    assert not any(stop in example.answer for stop in example.stop)
    assert example.max_tokens >= count_tokens(example.answer)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_context_holds_question_and_answer_once_before_the_end(task):
    for seed in range(20):
        example = make(task, seed=seed)
        context, question = example.prompt.rsplit("\n", 1)
        assert context.count(question + example.answer) == 1


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.25), (0.5, 0.3, 0.7), (1.0, 0.75, 1.0)])
def test_the_answer_lies_at_the_depth_asked_for(task, depth, low, high):
    example = make(task, n_tokens=2000, depth=depth)
    context, question = example.prompt.rsplit("\n", 1)
    assert example.depth == depth
    assert low <= context.index(question + example.answer) / len(context) <= high


def test_recall_has_sixteen_facts_of_different_names():
    facts = re.findall(r"The key of (\w+) is \d{5}\.", make("recall").prompt)
    assert len(facts) == len(set(facts)) == 16


def test_the_needle_haystack_reads_as_sentences_from_start_to_end():
    context, _ = make("needle").prompt.rsplit("\n", 1)
    assert context.startswith("The ")
    assert context.endswith(".")
    assert ".." not in context


def test_names_and_values_are_never_those_of_training_rows():
    example = make("recall")
    facts = re.findall(r"The key of (\w+) is (\d{5})\.", example.prompt)
    assert all(tasks.is_held_out(name) and tasks.is_held_out(value) for name, value in facts)
    pairs = re.findall(r"(\w+) -> (\w+)\n", make("map").prompt)
    assert all(tasks.is_held_out(key) and tasks.is_held_out(value) for key, value in pairs)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_right_answer_scores_one_whatever_follows(task):
    example = make(task)
    for end in ("", ".", "\nThe key", " ->"):
        assert tasks.score(example, example.answer + end) == 1.0
    assert tasks.score(example, example.answer.strip()) == 1.0


@pytest.mark.parametrize("task", tasks.TASKS)
def test_wrong_answers_score_zero(task):
    example = make(task)
    for output in ("", " ", "\n", "!" + example.answer):
        assert tasks.score(example, output) == 0.0


@pytest.mark.parametrize("task", ["needle", "recall", "map"])
def test_part_of_an_answer_or_more_than_it_is_wrong(task):
    example = make(task)
    assert tasks.score(example, example.answer[:-1]) == 0.0
    assert tasks.score(example, example.answer + "7") == 0.0


def test_repetition_scores_characters_before_the_first_mismatch():
    example = replace(make("repetition"), answer=" abcd efgh.")
    assert tasks.score(example, " abcd efgh") == 0.9
    assert tasks.score(example, "abcX efgh.") == 0.3
    assert tasks.score(example, "Xbcd efgh.") == 0.0


def test_a_guess_scores_as_chance_does():
    examples = list(tasks.make_examples("recall", 50, n_tokens=400, count_tokens=count_tokens))
    guesses = [re.findall(r"\d{5}", example.prompt)[0] for example in examples]  # one of sixteen
    assert sum(map(tasks.score, examples, guesses)) / 50 < 0.2
    others = list(tasks.make_examples("needle", 50, n_tokens=400, count_tokens=count_tokens, seed=100))
    assert sum(tasks.score(a, b.answer) for a, b in zip(examples, others, strict=True)) == 0.0


def test_words_are_pronounceable_and_printable():
    example = make("map")
    assert set(example.prompt) <= set(string.ascii_lowercase + " ->\n")
