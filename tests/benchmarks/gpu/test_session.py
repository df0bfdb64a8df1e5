"""What `gpu_check.py` and `gpu_engine.py` do when time is short, a process dies, or there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.common.workers import Toy
from tests.benchmarks.gpu.toys import ToyGpu
from vllm_sparq.benchmarks.common.engine_process import EngineProcess, WorkerGoneError
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.gpu import cells, gpu_check, layer, worker
from vllm_sparq.benchmarks.gpu.session import Budget, Hand, Output, code_of, done_before, measure
from vllm_sparq.benchmarks.reporting.gpu_table import gpu_check_rows

ROOT = Path(__file__).parents[3]
ABOUT = {"commit": "abc", "dirty": False, "gpu": "NVIDIA H100"}


@dataclass(frozen=True)
class Job:
    name: str
    seconds: float


@dataclass
class Clock:
    """Time that passes where it is told to."""

    now: float = 100.0
    said: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def run(self, jobs: list[Job], takes: Callable[[Job], Any], path: Path, seconds: float = 100.0) -> list[Any]:
        """What is on record of the jobs, of which each ``takes`` so many seconds."""

        def ask(job: Any, within: float) -> list[dict[str, Any]]:
            on_disk = len(path.read_text().splitlines()) if path.exists() else 0
            self.now += takes(job)
            return [{"value": job.seconds, "on_disk": on_disk}]

        budget, output = Budget(seconds, self), Output(path, ABOUT)
        measure(jobs, ask, budget, output, "x", lambda job, record: self.said.append(job.name))
        return read_records(path)


def test_every_record_is_on_the_disk_before_the_next_job(tmp_path: Path) -> None:
    jobs = [Job(f"job {i}", 2.0) for i in range(4)]
    found = Clock().run(jobs, lambda job: job.seconds, tmp_path / "x.jsonl")
    assert [record["on_disk"] for record in found] == [0, 1, 2, 3]
    assert all(record["bench"] == "x" and record["gpu"] == "NVIDIA H100" for record in found)


def test_what_would_end_too_late_is_left_out_and_said(tmp_path: Path) -> None:
    """Jobs take twice their guess, so that the third would end after the budget; a small one still fits."""
    jobs = [Job("a", 20.0), Job("b", 20.0), Job("c", 20.0), Job("d", 5.0)]
    clock = Clock()
    found = {record["name"]: record for record in clock.run(jobs, lambda job: 2 * job.seconds, tmp_path / "x.jsonl")}
    assert found["c"]["left_out"] == "wants about 40 s, and 20 s are left"
    assert [name for name, record in found.items() if "left_out" not in record] == ["a", "b", "d"]
    assert clock.now <= 200
    assert clock.said == ["a", "b", "c", "d"]


def test_a_job_that_kills_its_process_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    """Processes that are real: one dies, one raises, one never answers."""
    hand = Hand(lambda: EngineProcess("the toy", Toy))
    orders = {"dies": ("vanish",), "raises": ("fail",), "stalls": ("spin",), "adds": ("add", 2, 3)}

    def ask(job: Any, within: float) -> list[dict[str, Any]]:
        return [{"sum": hand.ask(*orders[job.name], within=2.0 if job.name == "stalls" else 60.0)}]

    path = tmp_path / "x.jsonl"
    try:
        output = Output(path, ABOUT)
        measure([Job(name, 1.0) for name in orders], ask, Budget(100.0), output, "x", lambda job, record: None)
    finally:
        hand.kill()
    found = {record["name"]: record for record in read_records(path)}
    assert found["dies"]["error"] == "the toy ended before it answered, after saying the last word"
    assert found["dies"]["said"][-1] == "the last word"
    assert found["raises"]["error"] == "the toy: RuntimeError: the first line"
    assert found["raises"]["said"][-2:] == ["RuntimeError: the first line", "the second"]
    assert found["stalls"]["error"] == "the toy has not answered within 2 s"
    assert found["adds"]["sum"] == 5


def test_what_does_not_start_is_not_tried_for_ever(tmp_path: Path) -> None:
    hand = Hand(lambda: EngineProcess("the toy", Toy, "refuse"))

    def ask(job: Any, within: float) -> list[dict[str, Any]]:
        hand.ask("add", 1, 1, within=60.0)
        raise AssertionError

    jobs, path = [Job(str(i), 1.0) for i in range(4)], tmp_path / "x.jsonl"
    measure(jobs, ask, Budget(1e4), Output(path, ABOUT), "x", lambda job, record: None, lambda: hand.is_hopeless)
    kinds = ["error" if "error" in record else record["left_out"] for record in read_records(path)]
    assert kinds == ["error", "error", *["the process that has the GPU does not start"] * 2]


def test_results_of_the_same_code_and_gpu_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [{"name": "a"}, {"name": "b", "error": "x"}, {"name": "c", "left_out": "x"}, {"name": "d", "commit": "old"}]
    lines += [
        {"name": "e"},
        {"name": "e", "error": "died later"},
        {"name": "f", "error": "x"},
        {"name": "f", "error": 0.5},
    ]
    path.write_text("".join(json.dumps({"bench": "x", **ABOUT, **line}) + "\n" for line in lines))
    assert done_before([path, tmp_path / "absent.jsonl"], "x", ABOUT) == {"a", "f"}
    assert done_before([path], "y", ABOUT) == set()


def test_what_had_no_room_is_done_on_cards_that_are_no_larger(tmp_path: Path) -> None:
    """Two cards of one name; a line without numbers is of an engine, whose cache had none."""
    path = tmp_path / "x.jsonl"
    lines = [{"name": "a", "no_room": "x", "needed_gib": 60.0}, {"name": "b", "no_room": "x"}]
    path.write_text("".join(json.dumps({"bench": "x", **ABOUT, **line}) + "\n" for line in lines))
    assert done_before([path], "x", {**ABOUT, "gpu_gib": 39.4}) == {"a", "b"}
    assert done_before([path], "x", {**ABOUT, "gpu_gib": 79.2}) == {"b"}
    assert done_before([path], "x", ABOUT) == {"a", "b"}


def test_the_commit_is_said_only_where_git_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_sparq.benchmarks.gpu.session.code", lambda: {"commit": "abc", "dirty": True})
    assert code_of("def") == {"commit": "abc", "dirty": True}
    monkeypatch.setattr("vllm_sparq.benchmarks.gpu.session.code", lambda: {"commit": None, "dirty": None})
    assert code_of("def") == {"commit": "def", "dirty": False}
    assert code_of(None) == {"commit": None, "dirty": None}


def test_cells_are_selected_by_name() -> None:
    everything = cells.all_cells()
    names = [cell.name for cell in everything]
    assert len(set(names)) == len(names) > 80
    assert {cell.kind for cell in everything} == {"check", "graph", "copy", "decode", "prefill", "kernels"}
    assert {name for name in names if name.startswith("check/")} == {f"check/{name}" for name in cells.CHECKS}
    assert [cell.name for cell in cells.selected(everything, ["graph"])] == [n for n in names if n.startswith("graph/")]
    fitting = [cell.name for cell in cells.selected(everything, ["decode/int4/*", "copy"])]
    assert fitting == ["copy", "decode/int4/b16s32k", "decode/int4/b1s128k"]
    with pytest.raises(ValueError, match="--only 'decodes' fits no cell: --list names them"):
        cells.selected(everything, ["decodes"])
    far = next(cell for cell in everything if cell.name == "check/far").case
    assert far.pages_before * far.kv_heads * far.layout.page_bytes > 4 * 2**31


def test_what_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong answer, one that is no number, and a cell that failed; a method left out does not count."""
    good = {"name": "check/a", "check": "write", "error": 0.0, "limit": 0}
    assert gpu_check.summary([good, {"name": "copy", "left_out": "late"}, {"name": "x", "median_us": 1.0}]) == 0
    assert "left out, 1 cells: copy" in capsys.readouterr().out
    for bad in ({"error": 1.0}, {"error": float("nan")}, {"error": "RuntimeError: x"}):
        assert gpu_check.summary([{**good, **bad}]) == 1
    lines = [good, {**good, "error": 2.0}, {"error": "no"}, {"left_out": "late"}]
    assert ["FAIL" in gpu_check.said_of(line) for line in lines] == [False, True, True, False]


def test_what_had_no_room_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """And is no failure."""
    error = layer.NoRoomError(60.0, 39.4)
    record = {"name": "decode/x", "no_room": str(error), "needed_gib": error.needed_gib, "total_gib": error.total_gib}
    assert gpu_check.said_of(record) == "no room: needs 60.0 GiB, and the card has 39.4 GiB in total"
    assert gpu_check.summary([record]) == 0
    assert "too large for this card, 1 cells: decode/x" in capsys.readouterr().out


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a GPU that is a toy: one cell kills it, one check is wrong; the next run measures what is missing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(worker, "GpuWorker", ToyGpu)
    path = tmp_path / "x.jsonl"
    words = ["--no-compile", "--out", str(path), "--only", "check/[hm]*", "--only", "copy", "--only", "decode/int4"]
    words += ["--only", "decode/model/b64s128k"]
    assert gpu_check.main(words) == 1
    found = {record["name"]: record for record in read_records(path)}
    assert found["copy"]["error"] == "the process of the GPU ended before it answered, after saying Segmentation fault"
    after = found["decode/int4/b1s128k"]
    assert (after["median_us"], after["requests"], after["context"], after["gpu"]) == (1.0, 1, 131072, "NVIDIA H100")
    assert after["case"]["format"] == "int4"
    assert found["decode/model/b64s128k"]["needed_gib"] == 90.0
    said = capsys.readouterr().out
    assert "decode/int4/b1s128k" in said
    assert "failed: 2\n  check/heads\n  copy\n" in said
    assert gpu_check.main(words) == 1
    assert "1 cells to measure" in capsys.readouterr().out
    assert gpu_check_rows(read_records(path))[2].endswith(f"| {len(found) - 5} | 1 |")


@pytest.mark.parametrize("words", [["--only", "nothing"], []])
def test_bad_usage_and_no_gpu(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(words) == 2
    said = capsys.readouterr().err
    assert ("fits no cell" if words else "torch sees no CUDA device here") in said


def from_checkout(tmp_path: Path, *absent: str) -> subprocess.CompletedProcess[str]:
    """`gpu_check.py` of the tree alone, where some packages cannot be imported."""
    for folder in ("vllm_sparq", "benchmarks"):
        (tmp_path / "tree").mkdir(exist_ok=True)
        (tmp_path / "tree" / folder).symlink_to(ROOT / folder)
    script = tmp_path / "tree" / "run.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "sys.meta_path = [finder for finder in sys.meta_path if '__editable__' not in repr(finder)]\n"
        "sys.argv = ['gpu_check.py', '--list', '--only', 'copy']\n"
        f"runpy.run_path({str(ROOT / 'benchmarks/gpu/gpu_check.py')!r}, run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """The tree alone, where vLLM cannot be imported."""
    done = from_checkout(tmp_path, "vllm", "numpy", "rich")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("copy ")


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    """torch does not bring pydantic; vLLM does."""
    done = from_checkout(tmp_path, "vllm", "pydantic")
    assert (done.returncode, done.stderr) == (2, "gpu_check.py: needs pydantic: pip install pydantic\n")


def test_a_worker_is_waited_for_no_longer_than_asked() -> None:
    process = EngineProcess("the toy", Toy)
    process.start(60.0)
    with pytest.raises(WorkerGoneError, match="has not answered within 1 s"):
        process.ask("spin", within=1.0)
    process.kill()
    assert not process.process.is_alive()
