"""Scores of generated tasks through real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_sparq.benchmarks import quality
from vllm_sparq.cli import main


def test_summary_by_hand() -> None:
    rows = quality.summarise({"dense": [1, 1, 1, 0], "sparq": [1, 0, 1, 1]}, ["needle"], [512, 1024], n=2)
    assert [(row["context"], row["method"], row["score"], row["difference"]) for row in rows] == [
        (512, "dense", 1, 0),
        (512, "sparq", 0.5, -0.5),
        (1024, "dense", 0.5, 0),
        (1024, "sparq", 1, 0.5),
    ]
    assert rows[1]["difference_error"] == pytest.approx(0.5)  # of 0 and -1: deviation 0.707 over the root of 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "needle,haystack"], "unknown task 'haystack': choose from needle"),
        (["--model", "nowhere"], "no model in nowhere"),
        (["--methods", "sparq,int3"], "unknown method 'int3': name a format (model, int8"),
        (["--methods", "h2o+int4"], "unknown method 'h2o+int4'"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_methods_compose() -> None:
    found = quality.settings(["int4", "sparq", "sparq+kivi2"], ["4", "8"], {"r": 8})
    assert [(one.name, one.backend) for one in found] == [
        ("dense", "CPU_ATTN"),
        ("int4", "SPARQ"),
        ("sparq 1/4", "SPARQ"),
        ("sparq 1/8", "SPARQ"),
        ("sparq+kivi2 1/4", "SPARQ"),
        ("sparq+kivi2 1/8", "SPARQ"),
    ]
    assert found[1].options == {"r": 8, "format": "int4", "read": "dense"}
    assert found[5].options == {"r": 8, "dense_below": 0, "format": "kivi2", "compression": 8.0}


@pytest.mark.engine
def test_starved_sparq_loses_and_default_does_not(tmp_path: Path) -> None:
    """The measurement can tell: with next to nothing read the answers go; at compression 8 they stay."""
    out = tmp_path / "eval.jsonl"
    common = ["eval", "--tasks", "needle", "--lengths", "700", "--n", "12", "--out", str(out)]
    assert main([*common, "--compression", "8"]) == 0
    assert main([*common, "--compression", "8", "--options", '{"r": 1, "k": 2, "local": 1}']) == 0
    good, bad = [json.loads(line) for line in out.read_text().splitlines() if '"sparq 1/8"' in line]
    assert good["score"] >= 0.9
    assert bad["score"] <= 0.5
    assert bad["difference"] == pytest.approx(bad["score"] - 1, abs=0.1)
