"""`vllm-sparq bench engine --choice`: what mixing choices costs is what a step takes over the mean of its requests'."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.common.proof import WrongAttentionError
from vllm_sparq.benchmarks.common.records import versions
from vllm_sparq.benchmarks.engine import mixed
from vllm_sparq.benchmarks.engine.cases import Case, Model, engines, key_of
from vllm_sparq.benchmarks.engine.drafts import Turn
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main

CASE = mixed.MixedCase(context=512, batch=8, choices=(None, "off", {"k": 9}))
SECONDS = {"none": 0.010, "off": 0.020, '{"k": 9}': 0.016}


class Fake:
    """What looks like an engine: the seconds of a step are its requests' mean, and a tenth more where they differ."""

    def __init__(self, *, heard: bool = True) -> None:
        self.heard = heard
        self.case, self.asked, self.first = CASE, list[str](), True

    def ask(self, order: str, argument: Any = None) -> Any:
        if order == "choosing":
            return sum(self.case.asked(i) is not None for i in range(8)) if self.heard else 0
        if order == "prepare":
            self.case, self.first = argument, True
            self.asked.append(json.dumps([argument.asked(i) for i in range(4)]))
            return None
        names = [mixed.name_of((argument_of or {}).get("sparq")) for argument_of in map(self.case.asked, range(8))]
        mean = sum(SECONDS[name] for name in names) / 8 * (1.1 if len(set(names)) > 1 else 1)
        slow, self.first = (50 if self.first else 1), False
        return Turn(seconds=[mean * slow] * argument, n_tokens=8 * argument)


def test_mixing_costs_what_a_step_takes_over_the_mean_of_its_requests() -> None:
    engine: Any = Fake()
    record = mixed.measure_case(CASE, engine, rounds=2, steps=5)
    assert record["median_step_ms"] == pytest.approx(
        {"none": 10, "off": 20, '{"k": 9}': 16, "mixed": 1.1 * (3 * 10 + 3 * 20 + 2 * 16) / 8}, abs=1e-3
    )
    assert [record[name] for name in ("overhead", "least_overhead", "most_overhead")] == pytest.approx([0.1] * 3)
    assert engine.asked[:4] == [
        "[null, null, null, null]",
        '[{"sparq": "off"}, {"sparq": "off"}, {"sparq": "off"}, {"sparq": "off"}]',
        '[{"sparq": {"k": 9}}, {"sparq": {"k": 9}}, {"sparq": {"k": 9}}, {"sparq": {"k": 9}}]',
        '[null, {"sparq": "off"}, {"sparq": {"k": 9}}, null]',
    ]
    assert engine.asked == engine.asked[:4] * 3  # in turns
    text = io.StringIO()
    Console(file=text, width=200).print(mixed.table([record | {"method": "sparq", "model": "m"}]))
    assert "+10.0% (+10.0% .. +10.0%)" in text.getvalue()


def test_an_engine_that_does_not_hear_is_not_measured() -> None:
    engine: Any = Fake(heard=False)
    with pytest.raises(WrongAttentionError, match="8 of 8 requests chose what is read, and 0 are read so"):
        mixed.measure_case(CASE, engine, rounds=1, steps=2)


def test_the_overhead_is_the_median_of_turns() -> None:
    """A machine that is slow for a turn is as slow for all of it."""
    case = mixed.MixedCase(context=8, batch=2, choices=(None, "off"))
    seconds = {"none": [1.0, 9.0, 1.0], "off": [3.0, 27.0, 3.0], "mixed": [2.0, 18.0, 2.2]}
    record = mixed.record_of(case, seconds)
    assert record["overhead"] == 0
    assert (record["least_overhead"], record["most_overhead"]) == (0, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--choice", "on"], "argument --choice: 'on' is not JSON"),
        (["--choice", "on"], "in single quotes, or the word off"),
        (["--choice", "[]"], "argument --choice: '[]' is not a JSON object"),
        (["--choice", '{"format": "int4"}'], '--choice {"format": "int4"}: "sparq.format": "int4": a request may set'),
        (["--choice", '{"k": 128}'], 'is what engine \'sparq {"r": 16, "k": 128}\' does anyway: choose something else'),
        (["--choice", "off", "--methods", "kivi"], "--choice off is what engine 'kivi' does anyway"),
        (["--choice", "off", "--methods", "sparq,quest"], "--choice is for requests of one engine, not of 2"),
        (["--choice", "off", "--input-len", "8"], "leave --input-len and --text out"),
        (["--choice", "off", "--batch", "8,1"], "--batch 1 has no request for each of 2 choices"),
        (["--choice", "off", "--options", '{"lossless": true}'], "is what engine"),
        (["--choice", "off", "--batch", "4", "--context", "200000"], "use --context 130048 or less"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "engine", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_recorded_cases_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an engine: the line is there already."""
    path, model, engine = tmp_path / "x.jsonl", Model.of(WEIGHTS, 4), engines([], [{"r": 8}])[-1]
    case = mixed.MixedCase(context=512, batch=2, choices=(None, "off"))
    key = mixed.key_of(case, engine, model, 512)
    assert key != key_of(Case(context=512, batch=2), engine, model, 512)
    record = mixed.record_of(case, {"none": [1.0], "off": [3.0], "mixed": [2.1]})
    record |= {"key": key, "method": "sparq", "model": "m", "commit": "abc", **versions()}
    path.write_text(json.dumps(record) + "\n")
    words = ["--model", str(WEIGHTS), "--options", '{"r": 8}', "--context", "512", "--batch", "2", "--choice", "off"]
    assert main(["bench", "engine", *words, "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "+5.0%" in said
    assert "on record already (commit abc)" in said


@pytest.mark.engine
@pytest.mark.long
def test_requests_of_a_batch_choose(tmp_path: Path) -> None:
    """A small engine: what is measured is a batch of both."""
    path, words = tmp_path / "x.jsonl", ["--options", '{"r": 8, "k": 32, "dense_below": 0}', "--context", "512"]
    words += ["--model", str(WEIGHTS), "--batch", "2", "--choice", "off", "--rounds", "1", "--steps", "2"]
    assert main(["bench", "engine", *words, "--out", str(path)]) == 0
    (record,) = map(json.loads, path.read_text().splitlines())
    assert record["bench"] == "mixed"
    assert record["choices"] == ["none", "off"]
    assert record["attention"] == "4 × PagedImpl (SPARQ)"
    assert set(record["median_step_ms"]) == {"none", "off", "mixed"}
