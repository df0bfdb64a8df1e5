"""The evaluation and the tuner through real engines; and what proves what ran."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from vllm_sparq.attention_backends import engine as paged_engine
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality import evaluate as quality
from vllm_sparq.benchmarks.quality.engine import Engine, Run, Worker
from vllm_sparq.benchmarks.quality.forced import FORCED, ForcedTokens, prompts_measure
from vllm_sparq.benchmarks.quality.prompts import Wanted
from vllm_sparq.benchmarks.quality.shortening import shortened_by
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main
from vllm_sparq.config import parse_options
from vllm_sparq.console import UsageError
from vllm_sparq.reads import CUDA_BREAK_EVEN, READS


def test_what_a_prompt_measures() -> None:
    right = {"dense": True, "int4": True, "kivi": True, "sparq": False, "sparq+int4": False}
    assert {name: prompts_measure(Method.named(name)) for name in right} == right
    assert not prompts_measure(Method.named("kivi2", {"chunk": "exact"}))


def test_one_token_is_left_to_those_that_are_forced() -> None:
    processor = ForcedTokens(None, torch.device("cpu"), False)
    params = type("Params", (), {"extra_args": {FORCED: [3, 1]}})
    free = type("Params", (), {"extra_args": None})
    said: list[int] = []
    update = type("Update", (), {"added": [(0, free, [], []), (1, params, [], said)], "removed": [], "moved": []})
    processor.update_state(update)  # type: ignore[arg-type]
    for token in (3, 1):
        before = torch.randn(2, 5)
        after = processor.apply(before.clone())
        assert torch.equal(after[0], before[0])
        assert after[1].isfinite().nonzero().flatten().tolist() == [token]
        assert after[1, token] == before[1, token]
        said.append(token)
    assert torch.equal(processor.apply(before.clone()), before)


def worker(method: Method, *impls: Any) -> Worker:
    found = object.__new__(Worker)
    found.method, found.impls = method, list(impls)
    return found


def test_what_runs_must_be_what_was_asked_for() -> None:
    theirs = type("CPUAttentionBackendImpl", (), {})()
    ours = type("PagedImpl", (), {"__module__": "vllm_sparq.attention_backends.impl"})
    sparq = Method.named("sparq", {"k": 64})
    right, wrong = ours(), ours()
    right.options, wrong.options = parse_options(sparq.additional_config), parse_options({"sparq": {"k": 65}})
    worker(sparq, right, theirs)._check()  # a hybrid model: its sliding-window layers stay with vLLM
    worker(Method.named("dense"), theirs)._check()
    for method, impls in ((sparq, [theirs]), (sparq, [right, wrong]), (Method.named("dense"), [theirs, right])):
        with pytest.raises(RuntimeError, match="was asked for and"):
            worker(method, *impls)._check()


def test_what_is_left_to_the_platform_is_what_the_platform_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a layer has a number where its method says "auto"; another number is not what was asked for."""
    monkeypatch.setattr(paged_engine, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    sparq = Method.named("sparq", {"k": 64})
    right = type("PagedImpl", (), {"__module__": "vllm_sparq.attention_backends.impl"})()
    right.options = paged_engine.on_platform(sparq.parsed)
    assert right.options.dense_below == CUDA_BREAK_EVEN
    worker(sparq, right)._check()
    for below in (0, CUDA_BREAK_EVEN + 1):
        with pytest.raises(RuntimeError, match="was asked for and"):
            worker(Method.named("sparq", {"k": 64, "dense_below": below}), right)._check()


@pytest.mark.engine
def test_methods_tell_and_forcing_is_right(tmp_path: Path) -> None:
    """Two engines: dense, and one that reads everything, as the default does, and next to nothing, in turn.

    Reading everything step by step gives the text the probability that dense's prompt gives it, so forcing is right;
    next to nothing loses needles and bits, so what a running engine is told to read is what it reads.
    """
    run = Run(model=WEIGHTS, dtype="float32", engine_args={"kv_cache_memory_bytes": 1 << 28})
    options: dict[str, dict[str, Any]] = {"default": {}, "starved": {"r": 1, "k": 2, "local": 1}, "whole": {"k": 4096}}
    methods = {name: Method.named("sparq", {"dense_below": 0, **chosen}) for name, chosen in options.items()}
    examples = Wanted(model=WEIGHTS, tasks=["needle", "text"], lengths=[600], n=8).examples(4096)
    assert [example.task for example in examples] == ["needle"] * 8 + ["text"] * 8
    scores = {}
    with Engine(Method.named("dense"), run) as engine:
        assert not any("Sparq" in name for name in engine.classes)
        scores["dense"] = [
            quality.scored(*pair)["score"] for pair in zip(examples, engine.answer(examples), strict=True)
        ]
        engine.use(shortened_by(8))  # the same engine, asked with less
        shorter = [quality.scored(*pair)["score"] for pair in zip(examples, engine.answer(examples), strict=True)]
        assert fmean(shorter[8:]) > fmean(scores["dense"][8:]) + 0.05
    with Engine(methods["default"], run) as engine:
        assert engine.classes == ["PagedImpl"]
        for name, method in methods.items():
            engine.use(method)
            pairs = zip(examples, engine.answer(examples), strict=True)
            scores[name] = [quality.scored(*pair)["score"] for pair in pairs]
        engine.prepare(500, 3)
        assert len(engine.decode(4)) == 4
        engine.prepare(400, 2)  # the three before are gone, else a step would decode five
        assert all(seconds > 0 for seconds in engine.decode(2))
        other_pages = Method.named("sparq", {"dense_below": 0, "group_reduce": "probs"})  # and a mean value, by default
        for other in (Method.named("int4"), other_pages):
            with pytest.raises(ValueError, match="needs an engine of its own"):
                engine.use(other)
        assert engine.process.pid is not None
        os.kill(engine.process.pid, signal.SIGKILL)
        with pytest.raises(UsageError, match="ended before it answered"):
            engine.answer(examples)
    assert scores["whole"] == pytest.approx(scores["dense"], abs=2e-4)
    assert fmean(scores["default"][:8]) == 1
    assert fmean(scores["starved"][:8]) <= 0.5
    lost = {name: fmean(scores[name][8:]) - fmean(scores["dense"][8:]) for name in methods}  # bits per byte
    assert abs(lost["default"]) < 0.1, lost  # eight windows cannot tell it from nothing
    assert lost["starved"] > 0.1 + lost["default"], lost
    assert fmean(scores["starved"][8:]) - fmean(scores["dense"][8:]) > 0.2


@pytest.mark.engine
def test_a_tuner_ends_with_a_line_to_paste(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "--n", "2", "--context", "700", "--batch", "2", "--trials", "2", "--max-loss", "2"]
    words += ["--out", str(tmp_path), "--time-limit", "500"]
    assert main(words) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    options = json.loads(last.split(" ", 3)[3].strip("'"))
    parse_options(options)
    (found,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in found.read_text().splitlines()]
    assert records[0]["options"] == {}
    assert len(records) == 2
    assert all(record["time"] > 0 and record["held"] > 1 for record in records)
    assert main([*words[:-1], "0"]) == 0  # nothing is measured any more, everything is shown
    assert capsys.readouterr().out.strip().splitlines()[-1] == last


@pytest.mark.engine
def test_an_engine_that_does_not_start_says_why_in_a_line() -> None:
    run = Run(model=WEIGHTS, engine_args={"max_model_len": 10**6})
    with pytest.raises(UsageError, match=r"the dense engine: .*max_model_len"), Engine(Method.named("dense"), run):
        pass


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_eval_leaves_no_engine_and_the_next_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    """Killed when the first group of 32 answers is on disk, in the middle of the second."""
    words = ["eval", "--tasks", "needle", "--lengths", "1500", "--n", "40", "--methods", "int8", "--out", str(tmp_path)]
    code = "import sys; from vllm_sparq.cli import main; sys.exit(main(sys.argv[1:]))"
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen([sys.executable, "-c", code, *words], stdout=log, stderr=log, start_new_session=True)
        path = tmp_path / "examples.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < 32:
            assert parent.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert family
        parent.send_signal(number)
        parent.wait(60)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    before = path.read_bytes()
    assert main(words) == 0
    assert path.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 80


SWITCHED: tuple[dict[str, Any], ...] = (
    {},
    {"compression": 4.0, "r": None, "k": None},
    {"compression": 16.0, "r": None, "k": None, "min_k": 24},
    {"r": 4},
    {"k": 24},
    {"local": 0},
    {"mass": 0.6, "min_k": 8},
    {"dense_layers": 2},
    {"dense_below": 450},
    {"group_reduce": "probs", "mean_value": "off"},
    {"group_reduce": "probs"},
    {"mean_value": "on"},
    {"ranking": "int8"},
    {"mean_value": "off"},
)
"""Over r = 8 and k = 48: every dial that `eval`, `sweep` and `tune` may switch in a running engine."""


def test_every_dial_of_sparq_is_switched() -> None:
    assert {name for one in SWITCHED for name in one} == set(READS["sparq"].dials)


@pytest.mark.engine
@pytest.mark.long
def test_a_shared_engine_gives_what_an_engine_of_its_own_gives() -> None:
    """Whatever was read before: nats of every text, to the last bit, in float32."""
    run = Run(model=WEIGHTS, dtype="float32", engine_args={"kv_cache_memory_bytes": 1 << 28})
    examples = Wanted(model=WEIGHTS, tasks=["text"], lengths=[500], n=2).examples(4096)
    base = {"dense_below": 0, "r": 8, "k": 48}
    chosen = [{k: v for k, v in {**base, **one}.items() if v is not None} for one in SWITCHED]
    methods = [Method.named("sparq", options) for options in chosen]
    shared, engine, n_started = [], None, 0
    for method in [*methods, *methods[:3]]:  # and back to the first ones
        before = engine
        engine = quality._engine_for(method, run, engine, Console(quiet=True))
        n_started += engine is not before
        shared.append([output.nats for output in engine.answer(examples)])
    assert engine is not None
    engine.close()
    assert n_started < len(methods) / 2
    own = []
    for method in methods:
        with Engine(method, run) as alone:
            own.append([output.nats for output in alone.answer(examples)])
    for method, together, apart in zip([*methods, *methods[:3]], shared, [*own, *own[:3]], strict=True):
        assert together == apart, method.options
    assert len({tuple(nats) for nats in own}) >= len(methods) - 2  # the settings do differ
