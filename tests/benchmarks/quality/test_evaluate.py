"""The evaluation without engines: methods, cells, the folder that a killed run goes on from, and what is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.quality import engine as quality_engine
from vllm_sparq.benchmarks.quality import evaluate as quality
from vllm_sparq.benchmarks.quality.cells import cells, interval, table
from vllm_sparq.benchmarks.quality.divergence import distribution_file
from vllm_sparq.benchmarks.quality.engine import Output, Run
from vllm_sparq.benchmarks.quality.prompts import GENERATED, Wanted, read_haystack, read_text, text_windows
from vllm_sparq.benchmarks.quality.store import Store
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError

RUN = Run(model=WEIGHTS)
DENSE, SPARQ = Method.named("dense"), Method.named("sparq")


def wanted(*tasks: str, n: int = 8, length: int = 400, **more: Any) -> list[Example]:
    return Wanted(model=WEIGHTS, tasks=tasks, lengths=[length], n=n, **more).examples(4096)


class FakeEngine:
    """In place of an engine: says what ``say`` says to a method's examples, and counts."""

    say: Callable[[Method, Sequence[Example]], list[str]]
    asked: list[tuple[str, int]]
    max_model_len = 4096

    def __init__(self, method: Method, run: Run) -> None:
        self.method, self.classes = method, ["Fake"]

    def start(self) -> None:
        self.asked.append((self.method.name, 0))

    def use(self, method: Method) -> None:
        self.method = method

    def answer(self, examples: Sequence[Example], distributions: Path | None = None) -> list[Output]:
        self.asked.append((self.method.name, len(examples)))
        return [Output(text=text, n_tokens=len(text), nats=None) for text in type(self).say(self.method, examples)]

    def close(self) -> None:
        pass

    kill = close


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    FakeEngine.asked, FakeEngine.max_model_len = [], 4096
    FakeEngine.say = staticmethod(lambda method, examples: [example.answer for example in examples])
    monkeypatch.setattr(quality, "Engine", FakeEngine)
    return FakeEngine


def evaluated(examples: Sequence[Example], folder: Path, *methods: Method, run: Run = RUN) -> list[dict[str, Any]]:
    store = Store(folder, run)
    return quality.evaluate(methods or (DENSE, SPARQ), run, examples, store, Console(quiet=True))


def test_methods_and_compressions() -> None:
    found = quality.methods_at(["int4", "dense", "sparq", "sparq+kivi2"], ["4", "8"], {"dense_layers": 1})
    assert [(one.name, one.backend) for one in found] == [
        ("dense", None),
        ('int4 {"dense_layers": 1}', "SPARQ"),
        ('sparq 1/4 {"dense_layers": 1}', "SPARQ"),
        ('sparq 1/8 {"dense_layers": 1}', "SPARQ"),
        ('sparq+kivi2 1/4 {"dense_layers": 1}', "SPARQ"),
        ('sparq+kivi2 1/8 {"dense_layers": 1}', "SPARQ"),
    ]
    assert found[1].options == {"dense_layers": 1, "format": "int4", "read": "dense"}
    assert found[3].options == {"dense_layers": 1, "dense_below": 0, "compression": 8.0}


def test_engines_are_shared_where_the_cache_is_the_same() -> None:
    four, eight, codes = quality.methods_at(["sparq", "sparq+int4"], ["4", "8"], {})[1:4]
    assert quality_engine.same_cache(four, eight)
    assert not quality_engine.same_cache(four, codes)
    assert not quality_engine.same_cache(DENSE, four)
    assert not quality_engine.same_cache(SPARQ, Method.named("sparq", {"mean_value": "on"}))


def line(method: str, score: float, prompt: str = "p", **more: Any) -> dict[str, Any]:
    base = dict(task="needle", length=512, method=method, metric="begins", prompt_sha=prompt, n_cut_tokens=0)
    return {**base, "score": score, "output_tokens": 7, "prompt_tokens": 500, **more}


def test_cells_by_hand() -> None:
    dense = [line("dense", score, str(i)) for i, score in enumerate([1, 1, 1, 0])]
    sparq = [line("sparq", score, str(i), output_tokens=9) for i, score in enumerate([1, 0, 0, 0])]
    first, second = cells([*dense, *sparq, {**line("sparq", 0), "skipped": "too long"}])
    assert (first["method"], first["score"], first["n"], first["n_skipped"]) == ("dense", 75, 4, 0)
    assert "difference" not in first
    assert (second["score"], second["difference"], second["output_tokens"]) == (25, -50, 9)
    assert (second["n"], second["n_skipped"]) == (4, 1)
    assert second["difference_low"] == -100
    assert second["difference_high"] == 0


def test_a_difference_pairs_prompts_and_not_places() -> None:
    dense = [line("dense", 1, "a"), line("dense", 0, "b")]
    sparq = [line("sparq", 0, "b"), line("sparq", 1, "a")]
    _, second = cells([*dense, *sparq])
    assert (second["difference"], second["difference_low"], second["difference_high"]) == (0, 0, 0)


def test_an_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(200):
        low, high = interval([float(rng.random() < 0.7) for _ in range(60)])
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert interval([0.5] * 9) == (0.5, 0.5)


def test_twice_gives_the_same_lines(engine: type[FakeEngine], tmp_path: Path) -> None:
    examples = wanted("needle", "map", n=3)
    for name in ("a", "b"):
        evaluated(examples, tmp_path / name)
    assert (tmp_path / "a/examples.jsonl").read_bytes() == (tmp_path / "b/examples.jsonl").read_bytes()


def test_a_killed_run_goes_on(engine: type[FakeEngine], tmp_path: Path) -> None:
    examples = wanted("needle", "map", n=3)
    whole = evaluated(examples, tmp_path / "whole")

    def die_at_the_third(method: Method, asked: Sequence[Example]) -> list[str]:
        if len([one for one in engine.asked if one[1]]) == 3:
            raise KeyboardInterrupt
        return [example.answer for example in asked]

    engine.asked.clear()
    engine.say = staticmethod(die_at_the_third)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        evaluated(examples, tmp_path / "killed")
    path = tmp_path / "killed/examples.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "torn in the mid')
    engine.asked.clear()
    engine.say = staticmethod(lambda method, asked: [example.answer for example in asked])  # type: ignore[method-assign]
    again = evaluated(examples, tmp_path / "killed")
    assert [line | {"schema": None} for line in again] == [line | {"schema": None} for line in whole]
    assert engine.asked == [("sparq", 0), ("sparq", 3), ("sparq", 3)]  # dense is not even started
    assert path.read_bytes() == (tmp_path / "whole/examples.jsonl").read_bytes()


class ForcedEngine(FakeEngine):
    """Leaves word of its model where dense leaves its distributions, and of what it finds there as another method."""

    def __init__(self, method: Method, run: Run) -> None:
        super().__init__(method, run)
        self.run = run

    def answer(self, examples: Sequence[Example], distributions: Path | None = None) -> list[Output]:
        assert distributions is not None
        self.asked.append((self.method.name, len(examples)))
        files = [distributions / distribution_file(example) for example in examples]
        if self.method == DENSE:
            for file in files:
                file.write_text(self.run.dtype)
            return [Output(text="", n_tokens=1, nats=1.0) for _ in files]
        return [Output(text=file.read_text(), n_tokens=1, nats=1.0) for file in files]


def test_a_method_is_compared_with_dense_of_its_own_model(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One folder for two runs over the same tokens: a method that joins the first one later finds the first's dense."""
    monkeypatch.setattr(quality, "Engine", ForcedEngine)
    examples = wanted("text", n=2)
    one, other = Run(model=WEIGHTS), Run(model=WEIGHTS, dtype="float32")
    for run in (one, other):
        assert {line["output"] for line in evaluated(examples, tmp_path, run=run)[2:]} == {run.dtype}
    engine.asked.clear()
    joined = evaluated(examples, tmp_path, DENSE, Method.named("int4"), run=one)
    assert {line["output"] for line in joined[2:]} == {"bfloat16"}
    assert engine.asked == [("int4", 0), ("int4", 2)]  # dense is known, and so is what it left
    assert len(list(tmp_path.rglob(distribution_file(examples[0])))) == 2


def test_cells_of_other_evaluations_stay(engine: type[FakeEngine], tmp_path: Path) -> None:
    examples = wanted("needle", n=2)
    lines = evaluated(examples, tmp_path)
    store = Store(tmp_path, RUN)
    for seed in (0, 1, 0):
        about = {"seed": seed}
        store.write_cells(quality.summary(lines, [DENSE, SPARQ], RUN, about), about)
    written = read_records(tmp_path / "cells.jsonl")
    assert [(cell["method"], cell["seed"]) for cell in written] == [
        ("dense", 0),
        ("sparq", 0),
        ("dense", 1),
        ("sparq", 1),
    ]
    assert {"bench", "score", "low", "high", "n", "output_tokens", "kv_bytes_moved", "kv_bytes_held"} <= set(written[0])


def test_prompts_beyond_the_context_are_skipped_and_counted(engine: type[FakeEngine], tmp_path: Path) -> None:
    engine.max_model_len = 500
    examples = [*wanted("needle", n=2), *wanted("needle", n=2, length=600)]
    lines = evaluated(examples, tmp_path)
    assert [("skipped" in one) for one in lines] == [False, False, True, True] * 2
    assert lines[2]["skipped"].endswith("do not fit into 500")
    records = quality.summary(lines, [DENSE, SPARQ], RUN, {})
    assert [(one["length"], one["n"], one["n_skipped"]) for one in records if one["method"] == "dense"] == [
        (400, 2, 0),
        (600, 0, 2),
    ]
    shown = Console(width=140, record=True, quiet=True)
    with shown.capture() as captured:
        shown.quiet = False
        shown.print(table(records))
    assert "4 prompts did not fit" in captured.get()


FACTS = {
    "recall": (r"The key of \w+ is (\d{5})", 16),
    "needle_keys": (r"The key of \w+ is (\d{5})", 4),
    "qa": (r"\w+ keeps the \w+ in the (\w+)", 8),
}
"""Task -> what its facts look like, and how many there are: one who picks any of them is right once in as many."""


@pytest.mark.slow
@pytest.mark.parametrize("task", GENERATED)
def test_answers_at_random_score_at_chance(task: str, engine: type[FakeEngine], tmp_path: Path) -> None:
    """Values of other prompts score nothing; picking among a prompt's own facts scores one in as many."""
    examples = wanted(task, n=96, length=600)
    answers = [example.answer for example in examples]
    random.Random(0).shuffle(answers)
    by_prompt = dict(zip([example.prompt for example in examples], answers, strict=True))
    engine.say = staticmethod(lambda method, asked: [by_prompt[one.prompt] for one in asked])  # type: ignore[method-assign]
    scores = [one["score"] for one in evaluated(examples, tmp_path / "shuffled", DENSE)]
    at_most = {"qa": 1 / 24 + 0.06, "few_shot": 1 / 3 + 0.12}  # places are 24 words, kinds 3, which prompts share
    assert sum(scores) / len(scores) <= at_most.get(task, 0.05)
    if task in FACTS:
        pattern, n_facts = FACTS[task]
        rng = random.Random(1)

        def pick(method: Method, asked: Sequence[Example]) -> list[str]:
            found = [re.findall(pattern, one.prompt) for one in asked]
            assert {len(values) for values in found} == {n_facts}
            return [" " + rng.choice(values) for values in found]

        engine.say = staticmethod(pick)  # type: ignore[method-assign]
        scores = [one["score"] for one in evaluated(examples, tmp_path / "picked", DENSE)]
        assert sum(scores) / len(scores) == pytest.approx(1 / n_facts, abs=0.12)


def test_a_model_with_shuffled_answers_is_caught(engine: type[FakeEngine], tmp_path: Path) -> None:
    examples = wanted("recall", "repetition", n=20)

    def say(method: Method, asked: Sequence[Example]) -> list[str]:
        answers = [one.answer for one in asked]
        return answers if method == DENSE else answers[1:] + answers[:1]

    engine.say = staticmethod(say)  # type: ignore[method-assign]
    records = cells(evaluated(examples, tmp_path))
    for record in records:
        if record["method"] == "sparq":
            assert record["difference_high"] < -80


def test_another_metric_is_another_task(engine: type[FakeEngine], tmp_path: Path) -> None:
    examples = wanted("needle", "needle:holds", n=2)
    engine.say = staticmethod(lambda method, asked: ["It is" + one.answer for one in asked])  # type: ignore[method-assign]
    records = cells(evaluated(examples, tmp_path, DENSE))
    assert [(one["task"], one["score"]) for one in records] == [("needle", 0), ("needle:holds", 100)]


def test_windows_are_apart_and_their_ends_are_scored() -> None:
    class Tokenizer:
        bos_token_id = 7

        def __init__(self, adds: bool = True) -> None:
            self.adds = adds

        def decode(self, ids: Sequence[int]) -> str:
            return " ".join(map(str, ids))

        def __call__(self, text: str) -> Any:
            return SimpleNamespace(input_ids=[7, 50] if self.adds else [50])

    silent = text_windows(Tokenizer(adds=False), range(100, 200), length=20, n=5, n_scored=5)
    assert [one.prompt_ids[:2] for one in silent] == [(100, 101), (120, 121), (140, 141), (160, 161), (180, 181)]
    found = text_windows(Tokenizer(), range(100, 200), length=21, n=4, n_scored=5)
    assert [one.prompt_ids[:2] for one in found] == [(7, 100), (7, 125), (7, 150), (7, 175)]
    assert found[0].answer_ids == (115, 116, 117, 118, 119)
    assert found[0].n_prompt_tokens == 16
    with pytest.raises(UsageError, match=r"the text has 100 tokens, 6 windows of 21 need 120"):
        text_windows(Tokenizer(), range(100, 200), length=21, n=6, n_scored=5)
    for length, n_scored in ((3, 0), (6, 5)):
        with pytest.raises(UsageError, match=f"windows of {length} tokens leave nothing to read or to score"):
            text_windows(Tokenizer(), range(100, 200), length=length, n=1, n_scored=n_scored)


def test_a_haystack_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "hay.txt"
    path.write_text("\n".join(f"Sentence {i} says\nnothing much at all, does it? It ends here!" for i in range(40)))
    sentences = read_haystack(path)
    assert sentences[:2] == ["Sentence 0 says nothing much at all, does it?", "It ends here!"]
    for task in ("needle", "recall", "passkey", "qa", "needle_keys", "needle_values"):
        examples = wanted(task, n=2, length=500, haystack=sentences)
        for example in examples:
            assert example.prompt.count("nothing much") > 5
            assert 470 <= example.n_prompt_tokens <= 500


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text at"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UsageError, match=r"no text in .*: put .txt or .md files there"):
        read_text(tmp_path)
    (tmp_path / "a.md").write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        read_text(tmp_path)
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "needle,haystack"], "unknown task 'haystack': choose from needle"),
        (["--tasks", "needle:bleu"], "unknown metric 'bleu' of task 'needle': choose from begins"),
        (["--tasks", "text:holds"], "task 'text' is measured in bits and has no other metric"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--methods", "sparq,int3"], "unknown method 'int3'"),
        (["--compression", "0.5"], "--compression '0.5' is not usable: give numbers of at least 1"),
        (["--compression", "8,8"], "is named twice"),
        (["--n", "0"], "argument --n: '0' must be 1 or more"),
        (["--options", "[1]"], "argument --options: '[1]' is not a JSON object"),
        (["--options", "null"], "argument --options: 'null' is not a JSON object"),
        (["--dtype", "nope"], "argument --dtype: invalid choice: 'nope' (choose from 'bfloat16'"),
        (["--engine-args", '{"max_model_len": "x"}'], "max_model_len '\"x\"' must be a whole number above 0"),
        (["--lengths", "10", "--n", "1"], "give larger --lengths"),
        (["--tasks", "squad"], "give --data DIR with squad/dev-v1.1.json"),
        (["--haystack", "nowhere"], "no text at nowhere"),
        (["--out", __file__], "(it is a file): give a folder that can be written"),
        (
            ["--engine-args", '{"dtype": "float32"}'],
            "--engine-args: 'dtype' is set by this command itself: use --dtype",
        ),
        (["--engine-args", '{"attention-backend": "KIVI"}'], "is set by this command itself: use --methods"),
        (["--engine-args", '{"kv_cache_dtype": "fp8"}'], "is set by this command itself: use block formats"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = [] if {"--n", "--tasks"} & set(words) else ["--n", "1", "--lengths", "300"]
    assert exit_code("eval", *common, *words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_command_writes_what_it_prints(
    engine: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--tasks", "needle", "--lengths", "300", "--n", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.index("dense") < shown.index("sparq 1/8")
    first = (tmp_path / "cells.jsonl").read_bytes()
    assert main(words) == 0
    assert (tmp_path / "cells.jsonl").read_bytes() == first
    assert [json.loads(row)["method"] for row in first.splitlines()] == ["dense", "sparq 1/8"]
