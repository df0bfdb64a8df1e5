"""Lines of results: keys, what is on record, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.common import records
from vllm_sparq.console import UsageError

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_a_key_is_the_case_and_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    key = records.case_key("ops", {"context": 1, "method": "dense"})
    assert key == records.case_key("ops", {"method": "dense", "context": 1})
    others = [
        records.case_key("engine", {"context": 1, "method": "dense"}),
        records.case_key("ops", {"context": 2, "method": "dense"}),
    ]
    monkeypatch.setattr(records, "device", lambda: {"cpu": "another"})
    others.append(records.case_key("ops", {"context": 1, "method": "dense"}))
    assert key not in others
    assert len(set(others)) == 3


def test_lines_are_added_and_the_newest_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    mine = records.versions()
    records.append_records(path, [{"key": "a", "value": 1, **mine}])
    before = path.read_text()
    records.append_records(path, [{"key": "a", "value": 2, **mine}, {"key": "b", "value": 3, **mine}])
    assert path.read_text().startswith(before)
    assert all(json.loads(line)["schema"] == records.SCHEMA for line in path.read_text().splitlines())
    assert records.recorded(path, ["a", "c"]) == {"a": {"schema": records.SCHEMA, "key": "a", "value": 2, **mine}}
    assert records.recorded(path, ["a"], again=True) == {}
    assert records.recorded(None, ["a"]) == {}
    assert [line["value"] for line in records.read_records(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 7}', "x.jsonl:1 is a result of schema 7, and this version reads schemas 1 to 2: use another"),
        ("[1]", "x.jsonl:1 is not a JSON object"),
        ("{", "x.jsonl:1 is not a JSON object"),
    ],
)
def test_other_versions_are_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        records.read_records(tmp_path)
    with pytest.raises(UsageError, match=message):
        records.append_records(path, [{"key": "a"}])
    assert path.read_text() == line + "\n"


def test_lines_of_the_first_schema_stay_readable_and_new_ones_join_them(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"schema": 1, "key": "a"}\n{"key": "b"}\n')
    records.append_records(path, [{"key": "c"}])
    assert [line.get("schema") for line in records.read_records(path)] == [1, None, records.SCHEMA]


def test_dense_of_another_code_machine_or_instruction_set_stands_beside_nothing() -> None:
    origin = {"commit": "a", "dirty": False, "cpu": "c", "cores": 2, "isa": "avx2"}
    mine = {"bench": "x", "method": "kivi", "task": "t", **origin}
    dense = {**mine, "method": "dense", "v": 1}
    assert records.dense_beside(mine, [dense, mine, {**dense, "v": 2}]) == {**dense, "v": 2}
    others = (
        {"commit": "b"},
        {"changes": "1"},
        {"cpu": "d"},
        {"cores": 4},
        {"isa": "avx512"},
        {"gpu": "H100"},
        {"vllm-sparq": "0.2.0"},
    )
    for change in (*others, {"task": "u"}):
        assert records.dense_beside(mine, [dense | change]) is None


def test_own_results_say_how_their_caches_were_cut() -> None:
    for line in records.read_records(RESULTS):
        if line["bench"] in ("ops", "engine", "pressure", "requests"):
            assert line["schema"] == 2
            assert line["block_size"] or line["method"] == "vllm"
            assert line["kv_bytes_per_token"]
            assert line["isa"]


def test_own_results_can_be_read() -> None:
    found = records.read_records(RESULTS)
    assert {"ops", "engine"} <= {record["bench"] for record in found}
    assert all(record["commit"] and record["cpu"] for record in found if record["bench"] in ("ops", "engine"))


def test_provenance_names_code_and_machine() -> None:
    origin = records.provenance()
    assert {"commit", "dirty", "cpu", "cores", "python", "torch", "vllm", "vllm-sparq"} <= origin.keys()
    assert origin["cores"] >= 1


def copied(folder: Path, ignored: str) -> Any:
    """The module of a copy of it in a repository of somebody's, that has one commit and ignores a folder."""
    place = folder / "own" / "benchmarks" / "common" / "records.py"
    place.parent.mkdir(parents=True)
    shutil.copy(records.__file__, place)
    (folder / ".gitignore").write_text(f"{ignored}\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)
    spec = importlib.util.spec_from_file_location("copied_records", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_copy_in_a_project_has_no_commit_of_that_project(tmp_path: Path) -> None:
    assert copied(tmp_path, "own/").code() == {"commit": None, "dirty": None}


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.code() == {"commit": None, "dirty": None}


def test_two_dirty_trees_are_two_codes_and_one_is_itself(tmp_path: Path) -> None:
    module = copied(tmp_path, "nothing/")
    clean = module.code()
    assert clean["commit"]
    assert clean["dirty"] is False
    place, found = Path(module.__file__), []
    for text in ("# one", "# two"):
        place.write_text(text)
        found.append(module.code())
        assert module.code() == found[-1]
    (place.parent / "new.py").write_text("# three")
    found.append(module.code())
    (place.parent / "results.jsonl").write_text("{}")
    assert module.code() == found[-1]  # what is measured writes its results
    assert all(one["dirty"] and one["commit"] == clean["commit"] for one in found)
    assert len({one["changes"] for one in found}) == 3
    assert not records.comparable(found[0], found[1])
    assert records.comparable(found[0], found[0])


@pytest.mark.parametrize("package", ["torch", "vllm", "vllm-sparq"])
def test_a_line_of_another_version_is_not_on_record(package: str, tmp_path: Path) -> None:
    path, line = tmp_path / "x.jsonl", {"key": "a", "commit": None, **records.versions()}
    records.append_records(path, [line | {package: "0.0.1"}])
    assert records.recorded(path, ["a"]) == {}
    records.append_records(path, [line])
    assert list(records.recorded(path, ["a"])) == ["a"]


def test_what_is_skipped_says_that_its_tree_was_dirty() -> None:
    lines = [{"commit": "a", "dirty": True}, {"commit": "b", "dirty": False}]
    assert records.skipped_note(lines).startswith("on record already (commit a with changes, b), not measured again")
