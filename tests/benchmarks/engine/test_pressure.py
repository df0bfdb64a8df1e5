"""The trace, the engines and the figures of `vllm-sparq bench pressure`."""

from __future__ import annotations

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.engine import pressure as pressure_bench
from vllm_sparq.benchmarks.engine.pressure import Trace, engines, summary
from vllm_sparq.cli import main
from vllm_sparq.console import UsageError


def test_a_trace_is_drawn_once() -> None:
    trace = Trace(n=20, rate=4.0, prompt_len=100, output_len=40, pool=1.0)
    requests = trace.requests()
    assert requests == trace.requests()
    assert [arrival for arrival, _, _ in requests] == sorted(arrival for arrival, _, _ in requests)
    assert all(50 <= len(prompt) <= 150 and 20 <= n <= 60 for _, prompt, n in requests)
    assert 2 < requests[-1][0] < 10  # twenty at four a second


def test_methods_that_evict_run_twice() -> None:
    found = engines(["h2o", "kivi", "streaming+int4"])
    assert [method.name for method in found] == [
        "dense",
        *("h2o, preempt", "h2o, evict"),
        "kivi",
        *("streaming+int4, preempt", "streaming+int4, evict"),
    ]
    assert found[2].options["pressure"] == "evict"
    with pytest.raises(UsageError, match="unknown method 'h3o'"):
        engines(["h3o"])


def test_figures_by_hand() -> None:
    """Two requests: tokens at 1, 2, 4 s and at 2, 3 s, asked at 0.5 and 1 s."""
    found = summary({"0": [1.0, 2.0, 4.0], "1": [2.0, 3.0]}, {"0": 0.5, "1": 1.0})
    assert (found["duration"], found["request_throughput"], found["output_throughput"]) == (4.0, 0.5, 1.25)
    assert found["mean_tpot_ms"] == 1250.0
    assert found["mean_itl_ms"] == pytest.approx((1000 + 2000 + 1000) / 3, abs=1e-3)
    assert found["mean_ttft_ms"] == 750.0


def test_the_least_trace_has_figures() -> None:
    trace = Trace(n=2, rate=1.0, prompt_len=2, output_len=4, pool=1.0)
    for prompt, n_output in ((prompt, n) for _, prompt, n in trace.requests()):
        assert prompt
        assert n_output >= 2
    found = summary({"0": [1.0, 2.0], "1": [2.0, 3.0]}, {"0": 0.5, "1": 1.0})
    assert found["p99_itl_ms"] == 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "1"], "argument --n: '1' must be 2 or more"),
        (["--prompt-len", "1"], "argument --prompt-len: '1' must be 2 or more"),
        (["--output-len", "1"], "argument --output-len: '1' must be 4 or more"),
        (
            ["--engine-args", '{"max_model_len": 4096}'],
            "'max_model_len' is set by this command itself: use --prompt-len",
        ),
        (["--engine-args", '{"additional_config": {}}'], "'additional_config' is set by this command itself: use --me"),
        (["--engine-args", '{"enforce_eager": false}'], "'enforce_eager' is set by this command itself: leave it out"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "pressure", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.engine
def test_a_real_trace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, and still too much for the pool; everybody is answered."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = []
    run = pressure_bench.run
    monkeypatch.setattr(pressure_bench, "run", lambda *arguments: rows.append(run(*arguments)) or rows[-1])
    words = ["--n", "8", "--rate", "100", "--output-len", "150", "--pool", "2", "--engine-args", '{"block_size": 32}']
    assert main(["bench", "pressure", *words]) == 0
    by_name = {row["method"]: row for row in rows}
    assert by_name["dense"]["preemptions"] > 0
    assert by_name["h2o, evict"]["preemptions"] == 0 < by_name["h2o, evict"]["preemptions_avoided"]
    assert "h2o, preempt" in capsys.readouterr().out
