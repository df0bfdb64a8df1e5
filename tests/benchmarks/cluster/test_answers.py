"""Prompts in, answers out: what is refused, and that a killed run loses and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.cluster import answers, prompts
from vllm_sparq.benchmarks.cluster.answers import Answers
from vllm_sparq.console import UsageError

CASE = {"model": "m", "data": "d"}

ORIGIN = json.dumps({"commit": "a", "cpu": "Xeon"}, sort_keys=True)


def row(i: int) -> dict[str, Any]:
    numbers = {"n_prompt_tokens": 3, "n_tokens": 2, "started": 1.0, "finished": 2.0, "preemptions": 0}
    return {
        "id": str(i),
        "text": f"t{i}",
        "token_ids": [i, 7],
        **numbers,
        "attention": "a",
        "origin": ORIGIN,
        "replica": "r",
    }


def test_answers_come_back_as_they_went_in(tmp_path: Path) -> None:
    with Answers(tmp_path, CASE) as store:
        store.add([row(0), row(1)])
        store.flush()
        store.add([row(2)])
    with Answers(tmp_path, CASE) as store:
        assert store.ids() == {"0", "1", "2"}
        store.add([row(3)])
        store.flush()
        assert list(store.rows()) == [row(i) for i in range(4)]
        assert len(store.shards()) == 3


def test_a_full_shard_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "SHARD_ROWS", 4)
    with Answers(tmp_path, CASE) as store:
        store.add([row(i) for i in range(3)])
        assert store.ids() == set()
        store.add([row(3)])
        assert len(store.ids()) == 4


def test_a_folder_belongs_to_one_case_and_one_run(tmp_path: Path) -> None:
    with Answers(tmp_path, CASE), pytest.raises(UsageError, match="another run is writing there"):
        Answers(tmp_path, CASE)
    with Answers(tmp_path, CASE | {"data": "c"}) as store:  # nobody answered: the folder is free
        assert store.n_rows() == 0
    with Answers(tmp_path, CASE) as store:
        store.add([row(0)])
    assert store.n_rows() == 1
    with pytest.raises(UsageError, match="holds a run with data 'd', and this one has 'e': give another folder"):
        Answers(tmp_path, CASE | {"data": "e"})
    with pytest.raises(UsageError, match="holds a run with data 'd', and this one has None: give another folder"):
        Answers(tmp_path, {"model": "m"})
    about = tmp_path / "run.json"
    about.write_text(json.dumps({"schema": 0, "case": CASE}))
    with pytest.raises(UsageError, match="was written with schema 0, this version has 2"):
        Answers(tmp_path, CASE)
    for broken in (b"{", b"[1]", b"\x80", b"[" * 5000, b'{"schema": 2, "case": 3}'):
        about.write_bytes(broken)
        with pytest.raises(UsageError, match="cannot be read"):
            Answers(tmp_path, CASE)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="give a folder that can be written"):
        Answers(tmp_path / "file", CASE)


def test_rows_of_another_machine_or_code_do_not_join_those_in_a_folder(tmp_path: Path) -> None:
    other = json.dumps({"commit": "a", "cpu": "EPYC"}, sort_keys=True)
    with Answers(tmp_path / "new", CASE) as store:  # a cluster of unlike nodes, all in one sitting
        store.add([row(0), row(1) | {"origin": other}])
    with Answers(tmp_path / "new", CASE) as store:
        store.add([row(2), row(3) | {"origin": other}])
    with Answers(tmp_path / "old", CASE) as store:
        store.add([row(0)])
    wrong = "rows that were made with cpu 'Xeon', and a replica now has 'EPYC': .* give another folder"
    with Answers(tmp_path / "old", CASE) as store, pytest.raises(UsageError, match=wrong):
        store.add([row(1), row(2) | {"origin": other}])
    assert store.ids() == {"0"}


ENDLESS = """
import sys, pathlib
from vllm_sparq.benchmarks.cluster import answers
from tests_rows import row
answers.SHARD_ROWS = 3
with answers.Answers(pathlib.Path(sys.argv[1]), {"model": "m", "data": "d"}) as store:
    for i in range(10**9):
        if str(i) not in store.ids():
            store.add([row(i)])
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """Killed without warning three times in the middle of writing: every row on disk is whole and there once."""
    (tmp_path / "tests_rows.py").write_text(ROWS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    folder, before = tmp_path / "out", 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(folder)], env=environment)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("part-*.parquet"))) < before + 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (folder / "part-999999.tmp").write_bytes(b"unfinished")
        with Answers(folder, CASE) as store:
            found = [one["id"] for one in store.rows(["id"])]
        assert len(found) == len(set(found)) >= 3 * (before + 4)
        assert sorted(map(int, found)) == list(range(len(found)))
        before = len(list(folder.glob("part-*.parquet")))
    assert not list(folder.glob("*.tmp"))


ROWS = """
def row(i):
    numbers = {"n_prompt_tokens": 3, "n_tokens": 2, "started": 1.0, "finished": 2.0, "preemptions": 0}
    return {"id": str(i), "text": "t", "token_ids": [i, 7], **numbers, "attention": "a", "origin": "{}", "replica": "r"}
"""


def test_prompts_of_a_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "one"}, {"prompt": "two", "id": "b", "max_tokens": 5, "seed": 9}]
    lines, table = tmp_path / "p.jsonl", tmp_path / "p.parquet"
    lines.write_text("".join(json.dumps(one) + "\n" for one in rows))
    parquet.write_table(
        pyarrow.Table.from_pylist([{"id": None, "max_tokens": None, "seed": None} | r for r in rows]), table
    )
    for path in (lines, table):
        source = prompts.from_file(path, max_tokens=8, seed=100)
        assert list(source()) == [
            prompts.Prompt(id="0", prompt="one", max_tokens=8, seed=100),
            prompts.Prompt(id="b", prompt="two", max_tokens=5, seed=9),
        ]
        assert prompts.survey(source()).n_rows == 2
    digests = {prompts.survey(prompts.from_file(path, max_tokens=8, seed=100)()).digest for path in (lines, table)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "1"}\n', "two prompts have the id '1'"),
        ("p.jsonl", '{"text": "a"}\n', "row 1: there is no text under the key 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{\n', "line 2 is not JSON"),
        ("p.jsonl", "[" * 5000, "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": "x"}\n', "max_tokens and seed must be whole numbers"),
        ("p.jsonl", "\n", "the data set holds no prompts"),
        ("p.parquet", "no", "is not a Parquet file"),
        ("p.csv", "prompt\n", "give a file that ends in .jsonl or .parquet"),
    ],
)
def test_bad_data(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        prompts.survey(prompts.from_file(path, max_tokens=8, seed=0)())
