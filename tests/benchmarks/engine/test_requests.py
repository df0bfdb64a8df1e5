"""`vllm-sparq bench engine --input-len`: whole requests, through vLLM's own commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError
from vllm_sparq.benchmarks.engine import requests as requests_bench
from vllm_sparq.benchmarks.engine.cases import Model
from vllm_sparq.benchmarks.engine.requests import Requests, columns, dense_of, key_of, measure, plan, speed, why_not
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main

SERVER = {"kv_capacity_tokens": 1, "max_concurrency": 1.0, "preemptions": 0, "attention": "4 × Impl"}


def record(method: str, **values: object) -> dict[str, object]:
    return {"model": "m", "method": method, "input_len": 8, "output_len": 4, "sparq": SERVER, **values}


def test_a_latency_for_each_batch_and_a_throughput() -> None:
    cases = plan(Requests(input_len=100, output_len=10, num_prompts=16), [1, 4])
    assert [(case.command, case.batch, case.num_prompts) for case in cases] == [
        ("latency", 1, None),
        ("latency", 4, None),
        ("throughput", None, 16),
    ]
    model = Model.of(None, 2)
    keys = {key_of(case, Method.named(name), model) for case in cases for name in ("dense", "sparq")}
    assert len(keys) == 6
    assert why_not(cases[0], model) is None
    assert "its vocabulary has 1,024" in str(why_not(cases[0], Model.of(WEIGHTS, 2)))
    assert why_not(cases[2], Model.of(WEIGHTS, 2)) is None


@pytest.mark.parametrize(
    ("command", "key", "better", "worse"),
    [("latency", "avg_latency", 1.0, 4.0), ("throughput", "tokens_per_second", 4.0, 1.0)],
)
def test_faster_is_more_than_one_and_slower_is_called_so(command: str, key: str, better: float, worse: float) -> None:
    case = {"command": command, "batch": 2, "elapsed_time": 1.0}
    fast, slow = (
        record("sparq", **case, **{key: value, "avg_latency": 1.0} | {key: value}) for value in (better, worse)
    )
    dense = record("dense", **case, **{key: 2.0})
    other = record("dense", **case, **{key: 2.0}) | {"input_len": 9}
    assert dense_of(fast, [fast, other, dense]) is dense
    assert dense_of(fast, [fast, other]) is None
    assert speed(fast, dense) == 2.0
    assert columns(fast, dense)["beside dense"] == "2.00x"
    assert columns(slow, dense)["beside dense"] == "0.50x, slower than dense"


@pytest.mark.engine
def test_real_requests_through_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    words = ["--model", str(WEIGHTS), "--methods", "h2o", "--input-len", "200", "--output-len", "8", "--batch", "1"]
    words += ["--num-prompts", "3", "--kv-cache-mib", "16", "--out", str(out)]
    assert main(["bench", "engine", *words]) == 0
    dense, h2o = (json.loads(line) for line in out.read_text().splitlines())
    for one in (dense, h2o):
        assert one["num_requests"] == 3
        assert one["tokens_per_second"] == pytest.approx(one["total_num_tokens"] / one["elapsed_time"])
    assert "(CPU_ATTN)" in dense["sparq"]["attention"]
    assert "PagedImpl (H2O)" in h2o["sparq"]["attention"]
    assert "no latency of weights" in capsys.readouterr().out
    assert main(["bench", "engine", *words]) == 0
    assert "on record already" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.engine
def test_a_silently_dense_engine_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = requests_bench.words_for_vllm

    def without_backend(*arguments: object) -> list[str]:
        words = given(*arguments)  # type: ignore[arg-type]
        return words[: words.index("--attention-backend")]

    monkeypatch.setattr(requests_bench, "words_for_vllm", without_backend)
    asked = Requests(input_len=50, output_len=4, num_prompts=2, kv_cache_bytes=16 << 20)
    with pytest.raises(WrongAttentionError, match=r"asked for the backend SPARQ and runs 4 × .*CPU_ATTN"):
        measure(asked, Method.named("sparq"), Model.of(WEIGHTS, 4))
