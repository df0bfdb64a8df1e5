"""Questions in a chat template, right answers forced, and tasks that a model cannot do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.quality import evaluate as quality
from vllm_sparq.benchmarks.quality.cells import FLOOR, cells, table
from vllm_sparq.benchmarks.quality.engine import Output
from vllm_sparq.benchmarks.quality.forms import chat_text, forced, in_chat
from vllm_sparq.benchmarks.quality.prompts import Wanted
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import UsageError

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end] {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def wanted(*tasks: str, template: str | None = TEMPLATE, n: int = 4, length: int = 400, **more: Any) -> Wanted:
    found = Wanted(model=WEIGHTS, tasks=tasks, lengths=[length], n=n, **more)
    found.tokenizer.chat_template = template
    return found


@pytest.mark.parametrize("task", ["needle", "recall", "needle_keys", "needle_values", "passkey", "qa"])
def test_questions_are_asked_in_the_template(task: str) -> None:
    """The last line begins the answer; lengths count the template too; the tokens are the text's."""
    given = wanted(task)
    plain = {example.seed: example for example in wanted(task, chat="off").examples(4096)}
    for example in given.examples(4096):
        ids = given.tokenizer(example.prompt, add_special_tokens=False).input_ids
        assert list(example.prompt_ids) == ids
        assert 360 < example.n_prompt_tokens == len(ids) <= 400
        assert example.prompt.startswith("[user] ")
        assert example.prompt.endswith(f"[end] [assistant] {plain[example.seed].prompt.rpartition(chr(10))[2]}")
        assert example.answer == plain[example.seed].answer
        assert example.max_tokens == plain[example.seed].max_tokens


def test_what_goes_on_with_a_text_takes_no_template() -> None:
    for example in wanted("repetition", "map", "quote", "few_shot", "text", n=2, length=600).examples(4096):
        assert "[assistant]" not in example.prompt


def test_without_a_template_or_told_not_to() -> None:
    for given in (wanted("needle", template=None), wanted("needle", chat="off")):
        assert all("[assistant]" not in example.prompt and not example.prompt_ids for example in given.examples(4096))


def test_a_template_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("eval", "--chat-template", "on", "--tasks", "needle", "--lengths", "300", "--n", "1") == 2
    assert "--chat-template on: the tokenizer of this model has none" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"none of these tasks asks anything; needle, recall"):
        wanted("repetition", chat="on").examples(4096)


def test_an_answer_s_tokens_go_on_with_the_prompt_s() -> None:
    given = wanted("needle:likelihood", "needle", template=None)
    likelihood, plain = given.examples(4096)[:4], given.examples(4096)[4:]
    for mine, example in zip(likelihood, plain, strict=True):
        assert mine.task == "needle:likelihood"
        whole = given.tokenizer(example.prompt + example.answer).input_ids
        assert [*mine.prompt_ids, *mine.answer_ids] == whole
        assert mine.max_tokens == len(mine.answer_ids)
        line = quality.scored(mine, Output(text="", n_tokens=3, nats=0.6931471805599453 * 5))
        assert line["score"] == pytest.approx(5)
    templated = in_chat(plain[0], wanted("needle").tokenizer)
    mine = forced(templated, given.tokenizer)
    assert mine.prompt_ids == templated.prompt_ids
    assert given.tokenizer.decode(mine.answer_ids).strip() == plain[0].answer.strip()


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("text:likelihood", "has no one right answer"),
        ("squad:likelihood", "has no one right answer"),
        ("qa:x", "likelih"),
    ],
)
def test_what_has_no_right_answer(task: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        wanted(task).examples(4096)


def test_quotes_are_in_the_text() -> None:
    sentences = ["A sentence of this user has exactly these ten words.", "Short one.", "Another one, number {}."]
    for haystack in (None, [text.format(i) for i in range(40) for text in sentences]):
        for example in wanted("quote", haystack=haystack, n=3).examples(4096):
            text, _, cue = example.prompt.rpartition('\nTo quote the text: "')
            assert f"{cue}{example.answer}" in text
            assert len(cue.split()) == 6
            assert example.metric == "prefix"


def test_shots_show_every_kind_and_the_answer_is_one() -> None:
    for example in wanted("few_shot").examples(4096):
        *shots, asked = example.prompt.split("\n")
        kinds = {shot.partition(": ")[2] for shot in shots}
        assert kinds == set(example.choices) == {"person", "thing", "place"}
        assert example.answer.strip() in kinds
        noun = asked.rstrip(":").split()[-1]
        same = {shot.partition(": ")[2] for shot in shots if shot.partition(":")[0].split()[-1] == noun}
        assert same <= {example.answer.strip()}


def lines(task: str, dense: float, mine: float) -> list[dict[str, Any]]:
    about = dict(task=task, length=9, metric="begins", n_cut_tokens=0, output_tokens=2, prompt_tokens=5)
    return [
        {**about, "method": method, "prompt_sha": str(i), "score": score}
        for method, score in (("dense", dense), ("int4", mine))
        for i in range(4)
    ]


def test_a_task_that_dense_fails_at_scores_nobody() -> None:
    records = cells(lines("recall", FLOOR / 100 - 0.01, 0.9)) + cells(lines("needle", FLOOR / 100, 0.1))
    assert ["beyond_model" in record for record in records] == [True, True, False, False]
    for record in records:
        record |= {"kv_bytes_moved": 1, "kv_bytes_held": 1}
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(records))
    said = captured.get()
    assert said.count("the model cannot do this") == 1
    assert "where dense scores below 50" in said
    papers = cells(lines("squad", 0.2, 0.1))  # a score in another unit: not ours to judge
    assert not any("beyond_model" in record for record in papers)


def test_chat_text_by_hand() -> None:
    tokenizer = wanted("needle").tokenizer
    assert chat_text("Hay. Hay.\nThe key is", tokenizer) == "[user] Hay. Hay. [end] [assistant] The key is"
    assert replace(in_chat(wanted("needle", chat="off").examples(4096)[0], tokenizer), prompt="").prompt_ids
