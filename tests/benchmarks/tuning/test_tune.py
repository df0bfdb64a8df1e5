"""The tuner and the sweep without engines: what they try, what they keep, what they choose."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks.commands import exit_code
from vllm_sparq.attention_backends import engine as paged_engine
from vllm_sparq.benchmarks.common import records
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality import sweep
from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape
from vllm_sparq.benchmarks.tuning import tune
from vllm_sparq.benchmarks.tuning.measure import Measured
from vllm_sparq.benchmarks.tuning.space import SPACE, Workload, draw, method_of, options_of, starting_points
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError, make_console

SHAPE = CacheShape(n_layers=4, n_heads=8, n_kv_heads=2, head_size=64, dtype=torch.bfloat16, max_model_len=4096)
WORK = Workload(shape=SHAPE, context=2048, batch=4)


def setting(time: float, held: float, bits: float, needles: float = 0.0, **options: Any) -> Measured:
    return Measured(options=options, time=time, tpot_ms=1.0, held=held, moved=0.1, bits=bits, needles=needles)


def test_settings_that_are_beaten_are_not_shown() -> None:
    fast, small, exact = setting(0.4, 1.1, 0.02, r=8), setting(0.6, 0.3, 0.02, r=16), setting(0.9, 1.0, 0.0, r=64)
    beaten = setting(0.6, 0.4, 0.03, r=4)
    assert tune.pareto([exact, beaten, small, fast]) == [fast, small, exact]
    assert tune.pareto([fast, replace(fast, options={"r": 9})]) == [fast, replace(fast, options={"r": 9})]


def test_what_a_platform_would_read_densely_is_read_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's break-even lies above the contexts that are searched by default: every dial would do nothing."""
    chosen = next(point for point in starting_points(WORK) if "k" in point)
    long = replace(WORK, context=8192)
    assert "dense_below" not in options_of(chosen, long)
    monkeypatch.setattr(paged_engine, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert options_of(chosen, long)["dense_below"] == 0
    assert "dense_below" not in options_of(chosen, replace(WORK, context=65536))


def test_the_choice_is_the_fastest_within_the_loss() -> None:
    fast, middle, exact = setting(0.4, 1.1, 0.02), setting(0.6, 0.3, 0.005), setting(0.9, 1.0, -0.001)
    misses = setting(0.3, 0.3, 0.0, needles=0.25)
    found = [exact, misses, fast, middle]
    assert tune.choose(found, 0.01) == middle
    assert tune.choose(found, 0.05) == fast
    assert tune.choose(found, 0.3) == misses
    assert tune.choose(found, -1) is None


def test_every_setting_that_can_be_drawn_can_be_served() -> None:
    seen: set[str] = set()

    def every(chosen: dict[str, Any], dials: Sequence[Any]) -> None:
        if not dials:
            options = options_of(chosen, WORK)
            method_of(options, "x")
            seen.add(json.dumps(options, sort_keys=True))
            assert 0 < SHAPE.held(Method(name="x", backend="SPARQ", options=options), 2048) < 2 * SHAPE.dense_bytes
            return
        dial, *rest = dials
        values = dial.values(WORK) if dial.when(chosen) else [None]
        for value in values if isinstance(values[0], str) else (values[0], values[-1]):
            every({**chosen, **({} if value is None else {dial.name: value})}, rest)

    every({}, SPACE)
    assert len(seen) > 50


def test_defaults_are_left_out_of_what_a_user_pastes() -> None:
    first = starting_points(WORK)[0]
    assert options_of(first, WORK) == {"r": 16, "k": 128}
    assert options_of({**first, "local_share": 0.5, "format": "int4"}, WORK) == {
        "r": 16,
        "k": 128,
        "local": 64,
        "format": "int4",
    }
    assert options_of(first, replace(WORK, context=1024))["dense_below"] == 0
    assert options_of({"read": "dense", "format": "int8"}, WORK) == {"read": "dense", "format": "int8"}


def test_starting_points_are_within_the_space() -> None:
    for point in starting_points(WORK):
        chosen = draw(lambda name, values, point=point: values[values.index(point[name])], WORK)
        assert chosen == point


class Args:
    """The arguments of a search."""

    def __init__(self, folder: Path, trials: int) -> None:
        self.out, self.trials, self.seed = folder, trials, 0


class NoEngines:
    def report(self, line: str) -> None:
        pass


def search(
    folder: Path, trials: int, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None
) -> tuple[Any, list[Any]]:
    """A search with a measure that needs no engine; raises at the measurement asked for."""
    measured: list[dict[str, Any]] = []

    def measure(engines: Any, method: Method, workload: Workload, examples: Any, baseline: Any) -> Measured:
        if fail_at is not None and len(measured) == fail_at:
            raise KeyboardInterrupt
        measured.append(method.options)
        options = method.options
        bits = 0.02 if options.get("format") == "kivi2" else 1 / options.get("k", 128)
        return setting(options.get("k", 128) / 100, SHAPE.held(method, 2048), bits, **options)

    monkeypatch.setattr(tune, "measure", measure)
    run = tune.Run(model=tune.quality.WEIGHTS)
    study = tune.open_study(Args(folder, trials), run, WORK, [])  # type: ignore[arg-type]
    quiet = type("Quiet", (), {"print": lambda *_: None})()
    arguments = Args(folder, trials), study, NoEngines(), WORK, [], {}, time.monotonic() + 60, quiet
    tune.search(*arguments)  # type: ignore[arg-type]
    return study, measured


def test_the_default_is_measured_first_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, measured = search(tmp_path, 12, monkeypatch)
    assert measured[0] == {}
    assert len(measured) == len({json.dumps(one, sort_keys=True) for one in measured}) == 12
    assert [one.options for one in tune.measured(study)] == measured


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, 9, monkeypatch, fail_at=3)
    study, measured = search(tmp_path, 9, monkeypatch)
    assert len(measured) == 6  # three were known
    found = [one.options for one in tune.measured(study)]
    assert found[0] == {}
    assert len(found) == 9
    points = [options_of(point, WORK) for point in starting_points(WORK)]
    assert all(point in found for point in points)  # the one that was being measured is not lost


def test_times_of_another_machine_or_code_are_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side in one folder, as a home that several machines share has it; each is found again."""
    code, device = records.code(), records.device()
    changes = ({}, {"commit": "another"}, {"cpu": "another"}, {"gpu": "H100"})
    names = []
    for n_known in (0, 2):
        for change in changes:
            monkeypatch.setattr(records, "code", lambda change=change: code | change)
            monkeypatch.setattr(records, "device", lambda change=change: device | change)
            study, measured = search(tmp_path, 2, monkeypatch)
            names.append(study.study_name)
            assert len(measured) == 2 - n_known
    assert names[:4] == names[4:]
    assert len(set(names)) == 4


def test_what_is_shown_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    found = [setting(0.5, 1.1, 0.012), setting(0.4, 0.4, 0.004, format="int4", r=16, k=128)]
    assert tune.show(make_console(), found, 0.01) == 0
    shown = capsys.readouterr().out
    last = shown.strip().splitlines()[-1]
    words = last.split(" ", 3)
    assert words[:3] == ["--attention-backend", "sparq", "--additional-config"]
    assert json.loads(words[3].strip("'")) == {"sparq": {"format": "int4", "r": 16, "k": 128}}
    assert "At least as fast as the default, losing no more: 1 of 1 settings." in shown
    assert "2.50 times as fast" in shown
    assert tune.show(make_console(), found, 0.001) == 1
    assert "No setting loses 0.001 or less; the least is 0.0040" in capsys.readouterr().out


def test_bytes_by_hand() -> None:
    """4 layers, 2 KV heads of 64 in two bytes: 4 * 2 * 2 * 64 * 2 = 2,048 bytes a token."""
    assert SHAPE.moved(Method.named("dense"), 1000) == 2048 * 1000
    assert SHAPE.held(Method.named("dense"), 1000) == 2048
    sparq = Method.named("sparq", {"r": 16, "k": 99, "dense_below": 0})
    # 16 of 64 channels: half a byte a token and 4 bytes of range a block of 128; then 100 tokens of 256 bytes
    per_head = 1000 * (16 * 0.5 + 16 * 4 / 128) + 100 * 256
    assert SHAPE.moved(sparq, 1000) == pytest.approx(8 * per_head, rel=1e-3)
    one_dense = Method.named("sparq", {"r": 16, "k": 99, "dense_below": 0, "dense_layers": 1})
    assert SHAPE.moved(one_dense, 1000) == pytest.approx(6 * per_head + 2 * 256_000, rel=1e-3)
    assert SHAPE.moved(Method.named("sparq", {"k": 2000}), 1500) == 2048 * 1500  # no longer than what would be picked
    # int4: half a byte an element, a step and a zero of two bytes for each of K and V
    assert SHAPE.held(Method.named("int4"), 1000) == 8 * (64 + 8)


def test_a_grid_is_dense_and_all_pairs() -> None:
    methods = sweep.grid("sparq+int4", [8, 16], [32, 64], {"dense_layers": 1})
    assert [one.name for one in methods][:3] == ["dense", "sparq+int4 r=8 k=32", "sparq+int4 r=8 k=64"]
    assert methods[-1].options["dense_layers"] == 1
    assert methods[-1].options["r"], methods[-1].options["k"] == (16, 64)
    assert all(tune.quality.same_cache(methods[1], other) for other in methods[2:])
    with pytest.raises(UsageError, match="'int4' ranks no tokens"):
        sweep.grid("int4", [8], [32], {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "--r", "65"], "--r 65 is more than the 64 channels of the model's heads"),
        (["sweep", "--method", "int4"], "ranks no tokens"),
        (["sweep", "--k", "0"], "argument --k: '0' must be 1 or more"),
        (["tune", "--max-loss", "nan"], "argument --max-loss: 'nan' is not a number"),
        (["tune", "--max-loss", "-1"], "argument --max-loss: '-1' must be 0 or more"),
        (["tune", "--trials", "0"], "argument --trials: '0' must be 1 or more"),
        (["tune", "--context", "4096"], "--context 4096"),
        (["tune", "--text", "nowhere"], "no text at nowhere"),
        (["tune", "--model", "nowhere"], "--model nowhere: no such folder"),
        (["tune", "--out", __file__], "(it is a file): give a folder that can be written"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--n", "1", "--lengths", "300"] if words[0] == "sweep" else ["--n", "1"]
    assert exit_code(*words, *sizes) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short.txt").write_text("Hardly any text. " * 20)
    assert main(["tune", "--text", str(tmp_path), "--context", "2000", "--out", str(tmp_path)]) == 2
    assert "give more text or less --context" in capsys.readouterr().err.replace("\n", " ")


def test_the_fastest_are_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that was too good to be true does not stay."""
    study, _ = search(tmp_path, 5, monkeypatch)
    lucky = tune.choose(tune.measured(study), 0.01)
    assert lucky is not None
    assert lucky.time < 5
    monkeypatch.setattr(tune, "times_in_turns", lambda engines, workload: [(1.0, 0.1), (5.0, 0.5)])
    engines: Any = type("Engines", (), {"dense": None, "for_method": lambda self, method: method})()
    quiet = type("Quiet", (), {"print": lambda *_: None})()
    tune.confirm(quiet, study, engines, WORK, 0.01)
    again = {json.dumps(one.options): one.time for one in tune.measured(study)}
    assert again[json.dumps(lucky.options)] == 5.0
    assert again["{}"] == 5.0
