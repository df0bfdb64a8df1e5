"""The papers' sets, from small files in the same formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.tasks import papers as paper_tasks
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import PAPER_TASKS, Limits, load_paper_task
from vllm_sparq.benchmarks.tasks.papers.metrics import ALL_METRICS
from vllm_sparq.console import UsageError

LIMITS = Limits(n=3, max_model_len=2000)


class Words:
    """A tokenizer of one token per word, with the parts of the interface that the sets use."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [] if not add_special_tokens else [0]
        for word in text.split(" "):
            self.words.append(word)
            ids.append(len(self.words))
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i - 1] for i in ids if i)


def write(path: Path, content: str | list[dict[str, Any]] | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def load(name: str, data: Path, limits: Limits = LIMITS) -> list[Example]:
    return load_paper_task(name, data, tokenizer=Words(), limits=limits)


def squad(n_articles: int = 12) -> dict[str, Any]:
    def qa(i: int, j: int) -> dict[str, Any]:
        answers = [{"text": f"answer {i} {j}", "answer_start": 0}, {"text": f"{i} {j}", "answer_start": 0}]
        return {"id": f"{i}-{j}", "question": f"What is {i} {j}?", "answers": answers}

    def paragraph(i: int) -> dict[str, Any]:
        return {"context": f"Text of article {i}.", "qas": [qa(i, 0), qa(i, 1)]}

    articles = [{"title": f"Article_{i}", "paragraphs": [paragraph(i)]} for i in range(n_articles)]
    return {"version": "1.1", "data": articles}


def test_squad_asks_one_shot_of_the_same_paragraph_among_seven_others(tmp_path: Path) -> None:
    write(tmp_path / "squad/dev-v1.1.json", squad())
    examples = load("squad", tmp_path)
    assert len(examples) == 3
    for example in examples:
        *contexts, _, question, answer, asked, ending = example.prompt.split("\n")
        i, j = example.answers[1].split()
        assert len(contexts) == 8
        assert f"Title: Article {i}. Background: Text of article {i}." in contexts
        assert (question, answer) == (f"Question: What is {i} {1 - int(j)}?", f"Answer: {i} {1 - int(j)}")
        assert (asked, ending) == (f"Question: What is {i} {j}?", "Answer:")
        assert example.max_tokens == 4 + 5  # " answer i j" in words, and some to spare
    again = load("squad", tmp_path)
    assert [example.prompt for example in again] == [example.prompt for example in examples]
    assert [e.seed for e in load("squad", tmp_path, Limits(n=2, max_model_len=0))] == [e.seed for e in examples[:2]]


def test_triviaqa_takes_pages_of_the_right_length(tmp_path: Path) -> None:
    rows = []
    for i, length in enumerate([100, 5000, 7000, 9000]):
        write(tmp_path / f"triviaqa/evidence/wikipedia/P{i}.txt", "x" * length)
        answer = {"Value": f"v{i}", "Aliases": [f"v{i}", f"V {i}"]}
        rows.append({"Question": f"Who {i}?", "Answer": answer, "EntityPages": [{"Filename": f"P{i}.txt"}]})
    write(tmp_path / "triviaqa/qa/wikipedia-dev.json", {"Data": rows})
    examples = load("triviaqa", tmp_path)
    assert sorted(example.answers[0] for example in examples) == ["v1", "v2"]
    assert all(example.prompt.endswith("?\nAnswer:") for example in examples)
    (tmp_path / "triviaqa/evidence/wikipedia/P2.txt").unlink()
    with pytest.raises(UsageError, match=r"Data\[2\] names the page .*P2.txt, which is not there"):
        load("triviaqa", tmp_path)


def test_cnn_dailymail_takes_articles_of_the_right_length(tmp_path: Path) -> None:
    path = tmp_path / "cnn_dailymail/validation.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, ["id", "article", "highlights"])
        rows.writeheader()
        for i, length in enumerate([10, 2100, 2500]):
            rows.writerow({"id": i, "article": "w " * length, "highlights": f"short\nline {i}"})
    examples = load("cnn_dailymail", tmp_path)
    assert sorted(example.answers[0] for example in examples) == ["short\nline 1", "short\nline 2"]
    assert all(e.prompt.startswith("Article: w ") and e.prompt.endswith("\nSummary:") for e in examples)
    assert examples[0].max_tokens == 2  # as long as the reference: "short\nline", "1"


def test_wikitext_forces_what_follows_six_thousand_characters(tmp_path: Path) -> None:
    body = "".join(f"word{i:04d} " for i in range(1000))
    text = f" = First = \n\n = = Section = = \n{body}\n = Short = \n\nlittle\n = Second = \n\n{body}\n"
    write(tmp_path / "wikitext/wiki.train.raw", text)
    examples = load("wikitext", tmp_path)
    assert sorted(example.prompt[:9] for example in examples) == [" = First ", " = Second"]
    for example in examples:
        assert 6000 <= len(example.prompt) < 6010
        assert 400 <= len(example.answer) < 410
        assert example.answer.startswith(" word")
        assert example.prompt + example.answer in text
        assert example.metric == "bits_per_character"
        assert example.max_tokens == len(example.answer_ids)


def test_shakespeare_repeats_pieces_of_its_context(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a play\n" for i in range(1500))
    write(tmp_path / "shakespeare/input.txt", text)
    examples = load("shakespeare", tmp_path)
    assert len(examples) == 3
    for example in examples:
        context, cue = example.prompt[:-128].rstrip(), example.prompt[-128:]
        assert 6000 <= len(example.prompt) - 128 < 6200
        assert cue + example.answer in context
        assert 256 <= len(example.answer) < 280


def longbench(folder: Path, name: str, rows: list[dict[str, Any]], prompt: str, max_tokens: int = 32) -> None:
    write(folder / f"longbench/data/{name}.jsonl", rows)
    write(folder / "longbench/config/dataset2prompt.json", {name: prompt})
    write(folder / "longbench/config/dataset2maxlen.json", {name: max_tokens})


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"input": f"q{i}", "context": "c " * 50, "answers": [f"a{i}", f"b{i}"], "all_classes": None, **more}


def test_longbench_fills_its_own_prompts(tmp_path: Path) -> None:
    longbench(tmp_path, "hotpotqa", [row(i) for i in range(5)], "Read {context} and answer {input}:")
    examples = load("longbench_hotpotqa", tmp_path)
    assert [example.answers for example in examples] == [("a0", "b0"), ("a1", "b1"), ("a2", "b2")]
    assert examples[1].prompt.endswith("and answer q1:")
    assert (examples[1].metric, examples[1].max_tokens, examples[1].n_cut_tokens) == ("squad_f1", 32, 0)


def test_longbench_cuts_the_middle_and_says_so(tmp_path: Path) -> None:
    longbench(tmp_path, "qmsum", [row(0, context="c " * 500)], "Begin {context}end {input}", max_tokens=40)
    (example,) = load("longbench_qmsum", tmp_path, Limits(n=3, max_model_len=100))
    assert example.n_prompt_tokens == len(example.prompt_ids) == 60
    assert example.n_cut_tokens == 1 + 1 + 500 + 2 - 60  # <bos>, Begin, the context, "end q0"
    ids = list(example.prompt_ids)
    assert ids[:3] == [0, 1, 2]
    assert ids[-1] - ids[0] == 503
    assert ids[30] - ids[29] == example.n_cut_tokens + 1


def test_longbench_knows_classes(tmp_path: Path) -> None:
    longbench(tmp_path, "trec", [row(0, answers=["Date"], all_classes=["Date", "City"])], "{context}{input}")
    (example,) = load("longbench_trec", tmp_path)
    assert example.choices == ("Date", "City")


def test_every_longbench_set_has_a_metric() -> None:
    from vllm_sparq.benchmarks.tasks.papers.longbench import METRIC

    assert set(METRIC) == set(paper_tasks.LONGBENCH)
    assert set(METRIC.values()) <= set(ALL_METRICS)
    assert len(paper_tasks.LONGBENCH) == 15
    assert len(paper_tasks.RULER) == 13


@pytest.mark.parametrize(("name", "metric", "tokens"), [("niah_multivalue", "share", 128), ("qa_1", "holds", 32)])
def test_ruler_takes_what_its_generator_writes(tmp_path: Path, name: str, metric: str, tokens: int) -> None:
    rows = [{"index": i, "input": f"hay {i}", "outputs": [f"o{i}", "p"], "answer_prefix": " It is"} for i in range(2)]
    write(tmp_path / f"ruler/{name}/validation.jsonl", rows)
    examples = load(f"ruler_{name}", tmp_path)
    assert [example.prompt for example in examples] == ["hay 0 It is", "hay 1 It is"]
    assert (examples[0].answers, examples[0].metric, examples[0].max_tokens) == (("o0", "p"), metric, tokens)


def test_families_stand_for_their_sets() -> None:
    assert len(paper_tasks.expand(["ruler", "squad", "longbench"])) == 13 + 1 + 15
    assert set(paper_tasks.expand(["ruler", "longbench"])) < set(PAPER_TASKS)


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    first = PAPER_TASKS[name].files[0]
    with pytest.raises(UsageError, match=f"task '{name}' reads local files: give --data DIR with {first}"):
        load_paper_task(name, None, tokenizer=Words(), limits=LIMITS)
    with pytest.raises(UsageError, match=f"task '{name}' needs {tmp_path / first}, which is not there"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ruler_vt", '{"input": "a", "outputs": ["b"]}\n{"input": \n', r"validation.jsonl:2 is not a JSON object"),
        ("ruler_vt", '\n{"input": "a"}\n', r"validation.jsonl:2 has no 'outputs'"),
        ("ruler_vt", '{"input": "a", "outputs": "b"}\n', r"validation.jsonl:1: 'outputs' must be a list"),
        ("ruler_vt", "[" * 5000, r"validation.jsonl:1 is not a JSON object"),
        ("squad", "[" * 5000, r"dev-v1.1.json is not JSON that can be used"),
        ("ruler_vt", "[1]\n", r"validation.jsonl:1 is not a JSON object but list"),
        ("ruler_vt", "", r"holds nothing that its definition takes"),
        ("squad", '{"data": [\n{"title": }]}', r"dev-v1.1.json:2 is not JSON"),
        ("squad", '{"data": [{"title": "x"}]}', r"data\[0\] has no 'paragraphs'"),
        ("squad", "[]", r"dev-v1.1.json has no 'data'"),
        ("cnn_dailymail", "id,article\n1,x\n", r"validation.csv:1 has no 'highlights'"),
        ("cnn_dailymail", "id,article,highlights\n1,x\n", r"validation.csv:2 ends before its columns"),
        ("shakespeare", "too short", r"holds nothing that its definition takes"),
    ],
)
def test_what_is_malformed_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / PAPER_TASKS[name].files[0], content)
    with pytest.raises(UsageError, match=message):
        load(name, tmp_path)


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shakespeare/input.txt"
    path.parent.mkdir()
    path.write_bytes(b"one\ntwo\n\xff\xfe")
    with pytest.raises(UsageError, match=r"input.txt:3 is not UTF-8"):
        load("shakespeare", tmp_path)


def test_a_prompt_that_asks_for_more_than_a_line_has_is_named(tmp_path: Path) -> None:
    longbench(tmp_path, "qasper", [row(0)], "{context} {question}")
    with pytest.raises(UsageError, match=r"the prompt of qasper asks for 'question', .*qasper.jsonl:1 has none"):
        load("longbench_qasper", tmp_path)
