"""`vllm-sparq bench engine`: which engines run, that a slow one is called slow, and that a wrong one stops the run."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError, check_attention, with_dense
from vllm_sparq.benchmarks.engine import bench as engine_bench
from vllm_sparq.benchmarks.engine.cases import Case, Engine, Model, engines, key_of
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main


class Sleeper:
    """What looks like an engine whose decode steps take so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ask(self, order: str, argument: Any) -> list[float]:
        times = []
        for _ in range(argument if order == "decode" else 0):
            begin = time.perf_counter()
            time.sleep(self.seconds)
            times.append(time.perf_counter() - begin)
        return times


def test_a_slow_method_is_called_slower_than_dense() -> None:
    seconds = {"dense": 0.004, "no attention": 0.002, "sparq": 0.001, "kivi": 0.012}
    engines: Any = {name: Sleeper(one) for name, one in seconds.items()}
    measured = engine_bench.measure_case(Case(context=8, batch=1), engines, rounds=2, steps=5)
    text = io.StringIO()
    Console(file=text, width=200).print(engine_bench.table([{"model": "m", **record} for record in measured]))
    rows = {name: line for line in text.getvalue().splitlines() for name in seconds if f"│ {name} " in line}
    assert "slower than dense" in rows["kivi"]
    assert not any("slower" in rows[name] for name in ("dense", "no attention", "sparq"))
    assert measured[3]["speedup_vs_vllm"] < 0.5 < 1.5 < measured[2]["speedup_vs_vllm"]


def test_methods_and_options_add_up_and_dense_is_always_there() -> None:
    found = engines(["kivi", "dense", "sparq+int4", "kivi"], [{"r": 8}])
    assert [engine.name for engine in found] == ["dense", "no attention", "kivi", "sparq+int4", 'sparq {"r": 8}']
    assert found[4].arguments == {"attention_backend": "SPARQ", "additional_config": {"sparq": {"r": 8}}}
    assert found[0].arguments == {}
    assert [method.name for method in with_dense(["sparq", "dense"])] == ["dense", "sparq"]
    keys = {key_of(Case(context=8, batch=1), engine, Model.of(None, 4), 8) for engine in found}
    assert len(keys) == len(found)


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
        engine_bench.start(stack, [silent], Model.of(WEIGHTS, 4), WEIGHTS, 64, 1, lambda line: None)
