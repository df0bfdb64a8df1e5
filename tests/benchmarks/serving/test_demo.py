"""The demo: its questions, its table, and one real run of it that leaves nothing behind."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.server import Completion
from vllm_sparq.benchmarks.serving import demo
from vllm_sparq.benchmarks.serving.demo_report import Row, Run, Side, print_run, run_as_json
from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.config import Options
from vllm_sparq.reads import HeadShape

SHAPE = ModelShape(head_size=64, n_heads=8, n_kv_heads=2, n_layers=4, dtype=torch.float32, max_model_len=4096)
COMMAND = [sys.executable, "-c", "import sys; from vllm_sparq.cli import main; sys.exit(main(sys.argv[1:]))", "demo"]

OURS = {"layer 0": {"backend": "SPARQ", "impl": "PagedImpl", "ops": {"write": "cpu (AVX2)", "prefill": "cpu (AVX2)"}}}
DENSE = {"layer 0": {"backend": "CPU_ATTN", "impl": "CPUAttentionBackendImpl"}}


def options(**given: Any) -> Options:
    return Options(**given)


def made_up_run(sparq_text: str, dense_text: str, task: str = "needle") -> Run:
    example = tasks.Example(
        task=task,
        prompt="A haystack.\nThe key of balu is",
        answer=" 12345" if task == "needle" else " mopa tiro",
        n_prompt_tokens=1000,
        depth=0.25,
        seed=0,
        max_tokens=10,
        stop=(".",),
        metric="begins" if task == "needle" else "prefix",
    )
    sparq, dense = Completion(sparq_text, 1000, 6, 0.05), Completion(dense_text, 1000, 6, 0.10)
    read = options(dense_below=0).read_of(HeadShape(head_size=64, n_heads=8, n_kv_heads=2))
    return Run(
        model=WEIGHTS,
        bundled=True,
        options=options(dense_below=0),
        read=read,
        heads=HeadShape(head_size=64, n_heads=8, n_kv_heads=2),
        sides={"sparq": Side(OURS), "dense": Side(DENSE)},
        rows=[Row(example, sparq, dense, read.n_selected(1001), 1001)],
        seconds=60.0,
    )


def printed(run: Run, width: int = 120) -> str:
    out = io.StringIO()
    print_run(Console(file=out, width=width), run)
    return out.getvalue()


def test_questions_alternate_over_even_depths_and_fit() -> None:
    examples = demo.make_questions(WEIGHTS, SHAPE, [1024, 512], 4, seed=0)
    assert [e.task for e in examples] == ["needle", "repetition"] * 4
    assert [e.depth for e in examples] == [0.125, 0.375, 0.625, 0.875] * 2
    assert all(512 - 20 < e.n_prompt_tokens <= 512 for e in examples[:4])
    assert all(1024 - 20 < e.n_prompt_tokens <= 1024 for e in examples[4:])
    assert examples == demo.make_questions(WEIGHTS, SHAPE, [512, 1024], 4, seed=0)
    assert len({e.prompt for e in examples + demo.make_questions(WEIGHTS, SHAPE, [512, 1024], 4, seed=1)}) == 16


@pytest.mark.parametrize(
    ("given", "context", "expected"),
    [
        (dict(dense_below=0), 4096, 449),  # k = 7/64 of 4096, and the current token
        (dict(dense_below=0), 512, 257),  # k is at least 256
        (dict(dense_below=0), 100, 100),
        (dict(dense_below=5000), 4096, 4096),
        (dict(dense_below=0, dense_layers=2), 4096, round((2 * 4096 + 2 * 449) / 4)),
        (dict(dense_below=0, dense_layers=9), 4096, 4096),
        (dict(read="dense"), 4096, 4096),
        (dict(read="dense", retention="window", budget=256), 3900, 256),
        (dict(dense_below=0, retention="heavy_hitter", budget=256), 3900, 256),
        (dict(dense_below=0, lossless=True), 3900, 3900),
    ],
)
def test_tokens_read(given: dict[str, Any], context: int, expected: int) -> None:
    resolved = options(**given)
    read = resolved.read_of(HeadShape(head_size=64, n_heads=8, n_kv_heads=2))
    assert demo.tokens_read(resolved, read, SHAPE, context) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "/no/such/model"), "no such folder"),
        (("--lengths", "8"), "--lengths 8: n_tokens=8 is too short"),
        (("--lengths", "4096"), "the model has positions for 4096: use 40"),
        (("--questions", "0"), "argument --questions: '0' must be 1 or more"),
        (("--port", "70000"), "argument --port: '70000' must be 65534 or less"),
        (("--json", "/dev/null/out.json"), "cannot be written (a folder above it is a file)"),
        (("--sparq", '{"r": 65}'), "r=65 is larger than the model's head size 64"),
    ],
)
def test_bad_usage_is_told_before_anything_starts(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("demo", *words) == 2
    assert message in capsys.readouterr().err


def test_the_table_shows_both_answers_and_what_was_read() -> None:
    text = printed(made_up_run(" 12345.", " 99999."))
    line = next(line for line in text.splitlines() if line.strip().startswith("needle"))
    words = "needle 1,000 25% The key of balu is 12345 ✓ ✗ 99999. 257 / 1,001 10.0 / 20.0"
    assert " ".join(line.split()) == words
    assert "1 × PagedImpl (backend SPARQ)" in text
    assert "write, prefill: cpu (AVX2)" in text
    flat = " ".join(text.split())
    assert "SparQ answered 1 of 1 in full, dense attention 0 (mean score 1.00 and 0.00)" in flat
    assert "read 257 of them, 3.9 times fewer" in flat
    assert "10.0 ms with SparQ and 20.0 ms with dense attention (0.50 times as long)" in flat


@pytest.mark.parametrize(
    ("given", "n_read", "said"),
    [
        ({"retention": "window", "budget": 256, "read": "dense"}, 256, "had kept"),
        ({"lossless": True}, 1001, "dense attention over all of 1,001 tokens of context verified every one"),
    ],
)
def test_what_was_read_is_of_what_was_kept_or_verified(given: dict[str, Any], n_read: int, said: str) -> None:
    run = made_up_run(" 12345.", " 99999.")
    run = replace(run, options=options(**given), rows=[replace(run.rows[0], n_read=n_read)])
    text = " ".join(printed(run).split())
    assert said in text
    assert "after ranking them all" not in text
    assert "reads all of" not in text


@pytest.mark.parametrize("taken", [5000, 5001])
def test_a_taken_port_is_told(taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "is_taken", lambda port: port == taken)
    assert exit_code("demo", "--port", "5000") == 2
    said = f"--port 5000: the servers need 5000 and 5001, and another program listens on {taken}: give another"
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_passage_counts_by_how_far_it_is_right() -> None:
    text = printed(made_up_run(" mopa tire", " mopa tiro ne", task="repetition"))
    assert "◐ 89%" in text
    assert "✓" in text


@pytest.mark.parametrize(("width", "question", "answer"), [(80, False, False), (100, False, True), (120, True, True)])
def test_a_narrow_terminal_gets_fewer_columns(width: int, question: bool, answer: bool) -> None:
    lines = printed(made_up_run(" 12345.", " 99999."), width).splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert ("balu" in text, "12345" in text) == (question, answer)
    assert "257 / 1,001" in text


def test_json_has_answers_scores_and_workers() -> None:
    report = json.loads(json.dumps(run_as_json(made_up_run(" 12345.", " 99999."))))
    (question,) = report["questions"]
    assert question["sparq"]["score"] == 1.0
    assert question["dense"]["text"] == " 99999."
    assert question["tokens_read"] == {"sparq": 257, "dense": 1001}
    assert report["workers"]["sparq"]["ops"] == OURS["layer 0"]["ops"]
    assert report["ms_per_token_at_longest"] == {"sparq": 10.0, "dense": 20.0}


@pytest.mark.parametrize(
    ("layers", "ours", "message"),
    [
        (OURS, True, None),
        (DENSE, False, None),
        (OURS | {"layer 1": DENSE["layer 0"]}, True, None),  # a sliding-window layer
        (DENSE, True, "should run SparQ runs 1 × CPUAttentionBackendImpl (backend CPU_ATTN)"),
        ({}, True, "runs no attention at all"),
        (OURS, False, "should run dense attention runs 1 × PagedImpl"),
    ],
)
def test_a_wrong_class_in_the_worker_is_a_problem(layers: dict[str, Any], ours: bool, message: str | None) -> None:
    problem = Side(layers).problem(ours=ours)
    assert problem is None if message is None else message in str(problem)


@pytest.mark.engine
def test_a_real_run_answers_and_leaves_nothing(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    words = ["--lengths", "600", "--questions", "2", "--json", str(report_file)]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        servers = wait_for_descendants(process, 2)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "needle" in output
    report = json.loads(report_file.read_text())
    assert report["workers"]["sparq"]["classes"] == "4 × PagedImpl (backend SPARQ)"
    assert report["workers"]["dense"]["classes"].startswith("4 × ")
    assert "Sparq" not in report["workers"]["dense"]["classes"]
    assert [question["task"] for question in report["questions"]] == ["needle", "repetition"]
    for question in report["questions"]:
        assert question["tokens_read"]["sparq"] == 257
        assert question["n_prompt_tokens"] > 590
        assert question["sparq"]["n_tokens"] > 1
        assert question["sparq"]["decode_s"] > 0
        assert question["dense"]["decode_s"] > 0
    assert living(servers) == []


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_every_process(number: int, code: int) -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        started = wait_for_descendants(process, 5)  # two servers, and an engine core with its helper
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert output.strip().endswith(f"stopped by {signal.Signals(number).name}")
    assert living(started) == []


def wait_for_descendants(process: subprocess.Popen[str], n: int) -> list[psutil.Process]:
    """The processes below the demo, as soon as there are `n`."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
        if len(found) >= n:
            return found
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"the demo started fewer than {n} processes: {process.communicate()[0]}")


def living(started: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, and whatever runs in their groups."""
    return [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
