"""`gpu_engine.py`: the order of engines, one that dies, a checkout that vLLM finds; no engine, no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.gpu.toys import ToyEngine
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.engine.cases import Case
from vllm_sparq.benchmarks.gpu import engines, gpu_engine, session
from vllm_sparq.benchmarks.gpu.engine_worker import StartLog
from vllm_sparq.benchmarks.gpu.site import make_site
from vllm_sparq.benchmarks.reporting.gpu_table import gpu_engine_rows

ROOT = Path(__file__).parents[3]
ABOUT = {"commit": "abc", "dirty": False, "gpu": "NVIDIA H100"}


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, minutes: float = 9.0, **more: Any
) -> list[dict[str, Any]]:
    """What is on record of engines of the shape 8b that are toys."""
    measured = gpu_engine.measured
    monkeypatch.setattr(gpu_engine, "machine", lambda: {"gpu": "NVIDIA H100"})
    monkeypatch.setattr(gpu_engine, "measured", lambda *given, **named: measured(*given, **named, make=ToyEngine))
    words = ["--models", "8b", "--methods", ",".join(names), "--out", str(tmp_path / "x.jsonl")]
    args = gpu_engine.parser().parse_args([*words, "--arguments", json.dumps(more)])
    planned = [job for job in engines.jobs(args.models, args.methods, args.rounds) if job.graphs]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    gpu_engine.run(args, planned, session.Budget(60 * minutes), folder)
    return read_records(tmp_path / "x.jsonl")


def test_default_settings_come_first_and_dense_beside_them() -> None:
    names = [job.name for job in engines.jobs(["8b", "1b"], list(engines.METHODS), 2)]
    assert names[:4] == ["8b/dense/graphs", "8b/sparq/graphs", "1b/dense/graphs", "1b/sparq/graphs"]
    assert len(set(names)) == len(names) == 8 * 5
    eager = [i for i, name in enumerate(names) if name.endswith("eager")]
    assert min(eager) > names.index("8b/sparq+int4/graphs")
    assert "8b/sparq/graphs/2" in names


def test_an_engine_is_measured_where_it_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 16 requests of 32k in 400,000 tokens, but 8; the table says how much faster than dense."""
    found = run(tmp_path, monkeypatch, "sparq")
    about = [(r["method"], r["what"], r.get("context"), r.get("batch"), "no_room" in r) for r in found]
    assert about[:6] == [
        ("dense", "start", None, None, False),
        ("dense", "prefill", 32768, None, False),
        ("dense", "decode", 32768, 16, True),
        ("dense", "decode", 32768, 8, False),
        ("dense", "prefill", 129024, None, False),
        ("dense", "decode", 129024, 1, False),
    ]
    assert len(about) == 12
    *_, line = gpu_engine_rows(found)
    assert line == (
        "| `8b/sparq/graphs` | 40 s | 400,000 | 0.33 s, 1.00x | 1.29 s, 1.00x | 8 requests: 4.00 ms, 2.50x "
        "| 1 request: 4.00 ms, 2.50x |"
    )
    assert run(tmp_path, monkeypatch, "sparq") == found  # all on record already


def test_an_engine_that_dies_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it measured before stays; without graphs it is tried next."""
    found = run(tmp_path, monkeypatch, "kivi", dies=1)
    dense = [record for record in found if record["name"] == "8b/dense/graphs"]
    assert [record["what"] for record in dense if "what" in record] == ["start", "prefill", *["decode"] * 2, "prefill"]
    assert dense[-1]["error"].endswith("after saying CUDA error: an illegal memory access was encountered")
    order = list(dict.fromkeys(record["name"] for record in found))
    assert order == ["8b/dense/graphs", "8b/dense/eager", "8b/kivi/graphs", "8b/kivi/eager"]
    assert any("died: 8b/kivi/graphs ended before it answered" in line for line in gpu_engine_rows(found))


def test_an_engine_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {record["name"]: record for record in run(tmp_path, monkeypatch, "sparq", graphs="refused")}
    assert found["8b/dense/graphs"]["said"][-1] == "RuntimeError: operation not permitted when stream is capturing"
    assert found["8b/dense/eager"]["what"] == "decode"


def test_another_attention_than_asked_for_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, "sparq", runs="FLASH_ATTN")
    wrong = [record["error"] for record in found if record["name"] == "8b/sparq/graphs"]
    assert len(wrong) == 1
    assert "was asked for the backend SPARQ and runs 1 × Impl (FLASH_ATTN)" in wrong[0]


def test_engines_that_would_end_too_late_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, "sparq", minutes=1.0)
    assert [(record["name"], "left_out" in record) for record in found] == [
        ("8b/dense/graphs", True),
        ("8b/sparq/graphs", True),
    ]


def test_methods_that_evict_always_have_room() -> None:
    case = Case(context=32768, batch=16)
    assert engines.room_for(case, Method.named("h2o"), 1000) is None
    assert engines.room_for(case, Method.named("sparq"), 1000) == "needs 528,384 tokens, and the cache holds 1,000"
    assert engines.room_for(case, Method.named("dense"), 600_000) is None


def test_what_starting_took_is_read_from_what_vllm_says() -> None:
    log = StartLog()
    log.lines = [
        "Model loading took 14.99 GiB memory and 2.512345 seconds",
        "Available KV cache memory: 55.25 GiB",
        "Graph capturing finished in 21 secs, took 0.58 GiB",
        "something else took 3 s",
    ]
    wanted = {"load": {"gib": 14.99, "s": 2.512345}, "kv_cache": {"gib": 55.25}, "capture": {"s": 21.0, "gib": 0.58}}
    assert log.figures == wanted


def test_vllm_finds_the_plugin_of_a_checkout(tmp_path: Path) -> None:
    """In a process that knows of no installed vllm-sparq."""
    site = make_site(ROOT, tmp_path / "site")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
from importlib import metadata
groups = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.stat_logger_plugins")
points = [point for group in groups for point in metadata.entry_points(group=group) if point.name == "sparq"]
print(metadata.version("vllm-sparq"), *(point.value for point in points))
import vllm_sparq.benchmarks.common.lines
print(vllm_sparq.benchmarks.common.lines.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    versions, place = done.stdout.splitlines()
    assert versions.startswith("0+checkout vllm_sparq.plugin:register ")
    assert "vllm_sparq.plugin:platform" in versions
    assert place.startswith(str(site))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--models", "70b"], "--models '70b' is no shape: use 8b, 1b"), ([], "torch sees no CUDA device here")],
)
def test_bad_usage_and_no_gpu(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_engine.main(words) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    made: argparse.ArgumentParser = gpu_engine.parser()
    with pytest.raises(SystemExit):
        made.parse_args(["--help"])
    assert "--arguments '{\"max_num_seqs\": 32}'" in capsys.readouterr().out
