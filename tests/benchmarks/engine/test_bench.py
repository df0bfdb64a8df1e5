"""`vllm-sparq bench engine`: which engines run, that a slow one is called slow, and that a wrong one stops the run."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.attention_backends.pace import FIRST
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention, with_dense
from vllm_sparq.benchmarks.common.records import versions
from vllm_sparq.benchmarks.engine import bench as engine_bench
from vllm_sparq.benchmarks.engine.cases import Case, Engine, Model, engines, key_of
from vllm_sparq.benchmarks.engine.drafts import ForcedAcceptance, Turn, acceptance
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError


class Sleeper:
    """What looks like an engine whose decode steps take so long, and give so many tokens."""

    def __init__(self, seconds: float, n_tokens: int = 1) -> None:
        self.seconds, self.n_tokens = seconds, n_tokens

    def ask(self, order: str, argument: Any) -> Any:
        if order == "verified":
            return [(3, self.n_tokens - 1)] * argument if self.n_tokens > 1 else []
        turn = Turn()
        for _ in range(argument if order == "decode" else 0):
            begin = time.perf_counter()
            time.sleep(self.seconds)
            turn.seconds.append(time.perf_counter() - begin)
            turn.n_tokens += self.n_tokens
        return turn


def test_a_slow_method_is_called_slower_than_dense() -> None:
    seconds = {"dense": 0.004, "no attention": 0.002, "sparq": 0.001, "kivi": 0.012}
    engines: Any = {name: Sleeper(one) for name, one in seconds.items()}
    measured = engine_bench.measure_case(Case(context=8, batch=1), engines, rounds=2, steps=5)
    text = io.StringIO()
    Console(file=text, width=200).print(
        engine_bench.table([{"model": "m", "threads": 2, **record} for record in measured])
    )
    rows = {name: line for line in text.getvalue().splitlines() for name in seconds if f"│ {name} " in line}
    assert "slower than dense" in rows["kivi"]
    assert not any("slower" in rows[name] for name in ("dense", "no attention", "sparq"))
    assert measured[3]["speedup_vs_vllm"] < 0.5 < 1.5 < measured[2]["speedup_vs_vllm"]


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_one_step_is_its_own_spread(n_tokens: int) -> None:
    engines: Any = {"dense": Sleeper(0.002), "no attention": Sleeper(0.001), "sparq": Sleeper(0.002, n_tokens)}
    measured = engine_bench.measure_case(Case(context=8, batch=1), engines, rounds=1, steps=1)
    assert all(one["p10_tpot_ms"] == one["p90_tpot_ms"] == one["median_tpot_ms"] for one in measured)


def test_methods_and_options_add_up_and_dense_is_always_there() -> None:
    found = engines(["kivi", "dense", "sparq+int4", "kivi"], [{"r": 8}])
    assert [engine.name for engine in found] == ["dense", "no attention", "kivi", "sparq+int4", 'sparq {"r": 8}']
    assert found[4].arguments == {"attention_backend": "SPARQ", "additional_config": {"sparq": {"r": 8}}}
    assert found[0].arguments == {}
    assert [method.name for method in with_dense(["sparq", "dense"])] == ["dense", "sparq"]
    keys = {key_of(Case(context=8, batch=1), engine, Model.of(None, 4), 8) for engine in found}
    assert len(keys) == len(found)


def test_a_step_of_several_tokens_is_as_fast_as_its_tokens() -> None:
    engines: Any = {"dense": Sleeper(0.02), "no attention": Sleeper(0.01), "sparq": Sleeper(0.04, 4)}
    measured = engine_bench.measure_case(Case(context=8, batch=1), engines, rounds=2, steps=5)
    assert measured[2]["tokens_per_step"] == 4
    assert measured[2]["acceptance"] == [1, 1, 1]
    assert 1.5 < measured[2]["speedup_vs_vllm"] < 2.5
    assert "acceptance" not in measured[0]


def test_acceptance_is_of_drafts_whose_predecessors_were_taken() -> None:
    assert acceptance([(3, 3), (3, 1), (2, 0), (3, 2)]) == [0.75, pytest.approx(2 / 3, abs=1e-4), 0.5]
    assert acceptance([(3, 0)]) == [0]
    assert acceptance([]) == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_drafts_are_accepted_as_often_as_is_asked_for(share: float) -> None:
    n = 2000
    metadata = SimpleNamespace(
        draft_token_ids=torch.randint(50, (n,), dtype=torch.int32),
        target_logits_indices=torch.arange(0, 2 * n, 2, dtype=torch.int32),
    )
    drafts = metadata.draft_token_ids
    sampler = SimpleNamespace(forward=lambda metadata, probs, logits, sampling: logits[::2].argmax(-1) == drafts)
    accepted = ForcedAcceptance(sampler, share)(metadata, None, torch.randn(2 * n, 50), None)
    assert accepted.float().mean() == pytest.approx(share, abs=0.05 * (0 < share < 1))


@pytest.mark.engine
def test_an_engine_that_drafts(tmp_path: Path) -> None:
    """Prompts of their own, and every draft taken: each step gives as many tokens and one."""
    options = {"lossless": True, "drafts": 2, "k": 64, "dense_below": 0}
    engine = engines([], [options], acceptance=1.0)[-1]
    room, model = Case(context=256, batch=2), Model.of(WEIGHTS, 4)
    file = tmp_path / "text.md"
    file.write_text("A step reads few tokens, and the next one reads them all. " * 60)
    text = model.tokens_of(file, 512)
    with contextlib.ExitStack() as stack:
        running, _ = engine_bench.start(stack, [engine], model, WEIGHTS, text, room, lambda line: None)
        process = running[engine.name]
        process.ask("prepare", room)
        first = process.ask("decode", FIRST)
        process.ask("decode", FIRST)  # without drafts
        assert set(process.ask("verified", 3)) == {(2, 2)}
    assert first.verified == [(2, 2)] * (2 * FIRST)
    assert first.tokens_per_step(batch=2) == 3
    with pytest.raises(UsageError, match=r"and the largest case needs 1,000,000: give more text"):
        model.tokens_of(file, 1_000_000)
    with pytest.raises(UsageError, match="give --model"):
        Model.of(None, 4).tokens_of(file, 1)


@pytest.mark.parametrize(
    ("method", "backends"),
    [("sparq", ["CPU_ATTN"]), ("sparq", ["KIVI"]), ("dense", ["CPU_ATTN", "SPARQ"]), ("kivi", [])],
)
def test_another_attention_than_asked_for_is_refused(method: str, backends: list[str]) -> None:
    report = {f"layer {i}": {"backend": name, "impl": f"{name}Impl"} for i, name in enumerate(backends)}
    with pytest.raises(WrongAttentionError, match=f"the engine of '{method}' was asked for"):
        check_attention(Method.named(method), report)


def test_layers_without_full_attention_may_stay_with_vllm() -> None:
    report = {name: {"backend": name, "impl": f"{name}Impl"} for name in ("SPARQ", "CPU_ATTN")}
    assert check_attention(Method.named("sparq"), report) == "1 × CPU_ATTNImpl (CPU_ATTN), 1 × SPARQImpl (SPARQ)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "sparrow"], "unknown method 'sparrow'"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--context", "200000"], "need 201024 positions, and the model has 131072: use --context 130048 or less"),
        (["--input-len", "140000"], "the model has 131072: use --input-len 130944 or less"),
        (
            ["--rounds", "30", "--steps", "32"],
            "--rounds 30 and --steps 32 are 992 steps with the turn that warms up, and",
        ),
        (
            ["--options", '{"lossless": true}', "--steps", "40"],
            "240 steps of up to 4 tokens with the turn that warms up",
        ),
        (["--choice", "off", "--batch", "2", "--steps", "958"], "--steps 958 is more than a request has tokens for"),
        (["--text", "."], "--text needs a model that can read: give --model"),
        (["--acceptance", "1.5"], "argument --acceptance: '1.5' must be 1 or less"),
        (["--input-len", "0"], "argument --input-len: '0' must be 1 or more"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "engine", *words) == 2
    assert message in capsys.readouterr().err


def test_recorded_cases_are_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an engine: the lines are there already."""
    path, case = tmp_path / "x.jsonl", Case(context=512, batch=1)
    values = {"threads": 2, "median_tpot_ms": 1.0, "p10_tpot_ms": 1.0, "p90_tpot_ms": 1.0, "commit": "abc"}
    values |= {"speedup_vs_vllm": 1.0, "share_of_bound": 1.0, "model": WEIGHTS.name, "context": 512, "batch": 1}
    values |= versions()
    model = Model.of(WEIGHTS, 4)
    lines = [values | {"key": key_of(case, one, model, 512), "method": one.name} for one in engines(["sparq"], [])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", str(WEIGHTS), "--methods", "sparq", "--context", "512", "--batch", "1", "--out", str(path)]
    assert main(["bench", "engine", *words]) == 0
    assert "1 of 1 cases: on record already (commit abc)" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.engine
def test_a_silently_dense_engine_stops_the_run() -> None:
    silent = Engine(method=Method.named("sparq"), arguments={})
    wrong = pytest.raises(WrongAttentionError, match=r"asked for the backend SPARQ and runs 4 × .*CPU_ATTN")
    with wrong, contextlib.ExitStack() as stack:
        engine_bench.start(
            stack, [silent], Model.of(WEIGHTS, 4), WEIGHTS, None, Case(context=64, batch=1), lambda line: None
        )
