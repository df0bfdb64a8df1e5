"""Which cases of the engine benchmarks are one: keys hold the threads that compute, and the weights that are run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.engine import mixed, pressure, requests
from vllm_sparq.benchmarks.engine.cases import Case, Model, engines, key_of
from vllm_sparq.benchmarks.serving import bench as serve_bench
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main

SPARQ = Method.named("sparq")
ENGINE = engines(["sparq"], [])[-1]


def keys_of(folder: Path | None) -> dict[str, str]:
    """Of a case of each bench; without a folder of those that can do without one."""
    model = Model.of(folder, 2)
    choosing = mixed.MixedCase(context=512, batch=2, choices=(None, "off"))
    found = {
        "engine": key_of(Case(context=512, batch=1), ENGINE, model, 512),
        "mixed": mixed.key_of(choosing, ENGINE, model, 512),
        "requests": requests.key_of(requests.Requests(input_len=8, output_len=8, batch=1), SPARQ, model),
    }
    if folder is None:
        return found
    parser = argparse.ArgumentParser()
    serve_bench.add_arguments(parser)
    return {**found, "serve": serve_bench.key_of(parser.parse_args([]), folder, SPARQ, 2.0)}


@pytest.fixture
def twins(tmp_path: Path) -> list[Path]:
    """Two checkpoints of one shape, in folders of one name."""
    found = []
    for i in range(2):
        folder = tmp_path / str(i) / "final"
        folder.mkdir(parents=True)
        shutil.copy(WEIGHTS / "config.json", folder)
        (folder / "model.safetensors").write_bytes(bytes([i]) * 100)
        found.append(folder)
    return found


def test_two_checkpoints_in_folders_of_one_name_are_two_cases(twins: list[Path]) -> None:
    one, other = map(keys_of, twins)
    assert [name for name in one if one[name] == other[name]] == []
    assert keys_of(twins[0]) == one


def test_pressure_tells_checkpoints_apart(twins: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "run", lambda method, *rest: {"method": method.name, "n_failed": 0})
    monkeypatch.setattr(pressure, "table", lambda *rest: "")
    out = tmp_path / "x.jsonl"
    for folder in twins:
        words = ["--model", str(folder), "--methods", "dense", "--n", "4", "--out", str(out)]
        assert main(["bench", "pressure", *words]) == 0
    one, other = map(json.loads, out.read_text().splitlines())
    assert one["key"] != other["key"]


def test_a_model_in_this_folder_has_its_name(twins: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(twins[0])
    assert Model.of(Path("."), 4).name == "final"
    assert Model.of(Path("../final"), 4).folder == twins[0].resolve()


def test_two_thread_counts_are_two_cases(twins: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pressure.Trace(n=2, rate=1.0, prompt_len=8, output_len=8, pool=1.0)
    case, found = {**asdict(trace), "engine_args": {}}, []
    for n in ("3", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", n)
        shape = ModelShape.of(twins[0])
        found.append({**keys_of(twins[0]), "pressure": pressure.key_of(case, SPARQ, shape, 64)})
    assert [name for name in found[0] if found[0][name] == found[1][name]] == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is all there is")
@pytest.mark.slow
def test_threads_are_those_of_the_cores_that_we_may_use() -> None:
    code = "from vllm_sparq.benchmarks.common.threads import engine_threads; print(engine_threads()['threads'])"
    free = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "VLLM_CPU"))}
    core = str(min(os.sched_getaffinity(0)))
    found = [
        subprocess.run([*words, sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        for words, env in (([], {**free, "OMP_NUM_THREADS": "1"}), (["taskset", "-c", core], free))
    ]
    assert found == ["1\n", "1\n"]


def test_a_checkpoint_of_float32_is_counted_as_it_runs(twins: list[Path]) -> None:
    """vLLM runs it in the first type of its platform, unless it is told to keep float32."""
    config = json.loads((twins[0] / "config.json").read_text()) | {"dtype": "float32", "torch_dtype": "float32"}
    (twins[0] / "config.json").write_text(json.dumps(config))
    kept, usual = (ModelShape.of(twins[0], dtype).dense_bytes for dtype in ("float32", "auto"))
    assert kept == 2 * usual
