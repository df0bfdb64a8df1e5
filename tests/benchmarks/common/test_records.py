"""Lines of results: keys, what is on record, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

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
    records.append_records(path, [{"key": "a", "value": 1}])
    before = path.read_text()
    records.append_records(path, [{"key": "a", "value": 2}, {"key": "b", "value": 3}])
    assert path.read_text().startswith(before)
    assert all(json.loads(line)["schema"] == records.SCHEMA for line in path.read_text().splitlines())
    assert records.recorded(path, ["a", "c"]) == {"a": {"schema": records.SCHEMA, "key": "a", "value": 2}}
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
    others = ({"commit": "b"}, {"cpu": "d"}, {"cores": 4}, {"isa": "avx512"}, {"gpu": "H100"}, {"vllm-sparq": "0.2.0"})
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
