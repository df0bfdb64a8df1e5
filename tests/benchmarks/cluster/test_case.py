"""What a figure of `bench ray` is of: one model, options and settings, one code, and its own machines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.cluster import actors, bench, data, prompts, replicas
from vllm_sparq.benchmarks.cluster import case as ray_case
from vllm_sparq.benchmarks.cluster import summary as ray_summary
from vllm_sparq.benchmarks.cluster.replicas import Pool, engine_arguments, with_options
from vllm_sparq.benchmarks.common import records
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import build_parser
from vllm_sparq.console import UsageError

N_ROWS = 4

HERE = {"commit": "c1", "dirty": False, "cpu": "laptop", "cores": 64, "isa": "avx2", **records.versions()}
NODE = HERE | {"cpu": "node", "cores": 8}


class Cluster:
    """Stands in for Ray and its engines.

    Attributes:
        asked: ids of the prompts that it was handed.
        origin: of its replicas.
        rate: tokens per second.
        dies_after: rows, of a method that is killed.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.origin = HERE
        self.rate = 10.0
        self.dies_after: dict[str, int] = {}
        self.clock = 1000.0

    def stream(self, pool: Pool, runner: str, todo: Iterator[prompts.Prompt]) -> Iterator[list[dict[str, Any]]]:
        for i, prompt in enumerate(todo):
            if i == self.dies_after.get(pool.method.name):
                raise KeyboardInterrupt
            self.asked.append((pool.method.name, prompt.id))
            begin, self.clock = self.clock, self.clock + 10 / self.rate
            yield [
                {
                    **{"id": prompt.id, "text": "t", "token_ids": [1] * 10, "n_prompt_tokens": 3, "n_tokens": 10},
                    **{"started": begin, "finished": self.clock, "preemptions": 0, "attention": pool.method.name},
                    **{"origin": json.dumps(self.origin), "replica": "r", "error": ""},
                }
            ]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(bench, "stream", found.stream)
    monkeypatch.setattr(bench, "cluster", lambda pool, address: nullcontext())
    monkeypatch.setattr(bench, "check_address", lambda address: None)
    monkeypatch.setattr(bench, "check_cores", lambda replicas, cpus: None)
    for module in (records, bench, ray_case):
        monkeypatch.setattr(module, "provenance", lambda: dict(HERE), raising=False)
    monkeypatch.setattr(records, "device", lambda: {"cpu": HERE["cpu"]})
    return found


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(N_ROWS)))
    words = ["bench", "ray", "--methods", "dense", "--data", str(file)]
    return [*words, "--out", str(tmp_path / "out"), "--record", str(tmp_path / "ray.jsonl")]


def lines(given: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(given[-1]).read_text().splitlines()]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--replicas", "1"], "replicas 2, and this one has 1"),
        (["--runner", "actors"], "runner 'data', and this one has 'actors'"),
        (["--batch-size", "3"], "batch_size 1, and this one has 3"),
        (["--cpus", "2"], "cpus_per_replica 1.0, and this one has 2.0"),
        (["--runtime-env", '{"env_vars": {"OMP_NUM_THREADS": "1"}}'], "runtime_env None"),
        (["--kv-cache-mib", "99"], "engine_arguments"),
    ],
)
@pytest.mark.parametrize("n_rows", [2, N_ROWS])
def test_rows_of_other_settings_make_no_rate(
    n_rows: int, more: list[str], name: str, ray: Cluster, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was killed in the middle, and of a whole one."""
    ray.dies_after = {"dense": n_rows} if n_rows < N_ROWS else {}
    if n_rows < N_ROWS:
        with pytest.raises(KeyboardInterrupt):
            exit_code(*given)
    else:
        assert exit_code(*given) == 0
    ray.dies_after, asked = {}, len(ray.asked)
    assert exit_code(*given, *more) == 2
    message = capsys.readouterr().err
    assert f"holds a run with {name}" in message
    assert "give another folder" in message
    assert len(ray.asked) == asked
    assert exit_code(*given, *more, "--out", f"{given[-3]}-2") == 0  # the remedy
    assert lines(given)[-1]["rows"] == N_ROWS
    assert len(ray.asked) == asked + N_ROWS


def test_rows_of_other_code_make_no_rate(
    ray: Cluster, given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*given) == 0
    monkeypatch.setattr(ray_case, "provenance", lambda: HERE | {"commit": "c2"}, raising=False)
    assert exit_code(*given) == 0  # on record
    assert exit_code(*given, "--again") == 2
    assert "holds a run with commit 'c1', and this one has 'c2': give another folder" in capsys.readouterr().err
    assert len(lines(given)) == 1


def test_again_measures_or_says_that_it_cannot(
    ray: Cluster, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*given) == 0
    assert exit_code(*given, "--again") == 2
    assert "--again measures anew, and --out" in capsys.readouterr().err
    assert len(lines(given)) == 1
    ray.rate = 20.0
    assert exit_code(*given, "--again", "--out", f"{given[-3]}-2") == 0
    assert [line["output_tokens_per_second"] for line in lines(given)] == [10.0, 20.0]
    assert lines(given)[0]["key"] == lines(given)[1]["key"]


def test_again_goes_on_after_a_kill_and_writes_no_line_twice(ray: Cluster, given: list[str]) -> None:
    words = [*given, "--again", "--methods", "sparq"]
    ray.dies_after = {"sparq": 2}
    with pytest.raises(KeyboardInterrupt):
        exit_code(*words)
    assert [line["method"] for line in lines(given)] == ["dense"]
    ray.dies_after = {}
    assert exit_code(*words) == 0
    assert [line["method"] for line in lines(given)] == ["dense", "sparq"]
    assert [line["wall_seconds"] is None for line in lines(given)] == [False, True]
    assert sorted(ray.asked) == [(method, str(i)) for method in ("dense", "sparq") for i in range(N_ROWS)]


def test_answers_without_a_record_are_recorded_later(ray: Cluster, given: list[str]) -> None:
    assert exit_code(*given[:-2]) == 0
    assert exit_code(*given) == 0
    assert len(ray.asked) == N_ROWS
    assert lines(given)[0]["output_tokens_per_second"] == 10.0


def test_a_folder_is_looked_at_before_any_engine_starts(
    ray: Cluster, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(given[-3]) / "sparq"
    out.mkdir(parents=True)
    (out / "run.json").write_text("{")
    assert exit_code(*given, "--methods", "sparq") == 2
    assert "its run.json cannot be read" in capsys.readouterr().err
    assert ray.asked == []


def test_the_machines_of_a_record_are_the_replicas_own(ray: Cluster, given: list[str]) -> None:
    ray.origin = NODE
    assert exit_code(*given, "--address", "head:6379") == 0
    (line,) = lines(given)
    assert (line["cpu"], line["cores"], line["address"]) == ("node", 8, "head:6379")
    assert line["machines"] == [NODE | {"replicas": 1}]
    assert line["driver"]["commit"] == "c1"
    assert "cpu" not in line["driver"]


def test_the_key_of_another_cluster_does_not_know_this_machine(
    ray: Cluster, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.origin = NODE
    for address in (["--address", "head:6379"], []):
        assert exit_code(*given, *address, "--out", f"{given[-3]}-{len(address)}") == 0
    monkeypatch.setattr(records, "device", lambda: {"cpu": "desktop"})
    assert exit_code(*given, "--address", "head:6379", "--out", f"{given[-3]}-3") == 0
    assert len(lines(given)) == 2
    assert exit_code(*given, "--out", f"{given[-3]}-4") == 0
    assert len(lines(given)) == 3


def test_unlike_machines_are_listed() -> None:
    found = ray_summary.machines_of({json.dumps(NODE): {"a", "b"}, json.dumps(HERE): {"c"}})
    assert (found["cpu"], found["cores"], found["commit"]) == ("laptop + node", "64 + 8", "c1")
    assert [(kind["cpu"], kind["replicas"]) for kind in found["machines"]] == [("laptop", 1), ("node", 2)]


def test_dense_of_another_machine_is_no_measure() -> None:
    dense = {"method": "dense", "output_tokens_per_second": 10.0, **HERE}
    assert ray_summary.beside({"output_tokens_per_second": 20.0, **HERE}, dense) == "2.00x"
    assert ray_summary.beside({"output_tokens_per_second": 20.0, **NODE}, dense) == "other code or machine"


def test_two_models_in_folders_of_one_name(
    ray: Cluster, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for parent in ("a", "b"):
        shutil.copytree(WEIGHTS, tmp_path / parent / "final")
    weights = next((tmp_path / "b" / "final").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")
    monkeypatch.chdir(tmp_path / "a" / "final")
    assert exit_code(*given, "--model", ".") == 0
    assert lines(given)[0]["model"] == "final"
    assert exit_code(*given, "--model", str(tmp_path / "b" / "final")) == 2
    assert "holds a run with fingerprint" in capsys.readouterr().err
    assert exit_code(*given, "--model", str(tmp_path / "b" / "final"), "--out", str(tmp_path / "other")) == 0
    assert len({line["key"] for line in lines(given)}) == 2
    assert len(ray.asked) == 2 * N_ROWS


def test_a_record_holds_the_whole_case(ray: Cluster, given: list[str]) -> None:
    more = ["--engine-args", '{"max_num_seqs": 3}', "--output-len", "7", "--ignore-eos", "--seed", "5"]
    assert exit_code(*given, *more) == 0
    generated = ["bench", "ray", "--methods", "dense", "--n", "2", "--input-len", "300", "--record", given[-1]]
    assert exit_code(*generated, "--out", f"{given[-3]}-2") == 0
    of_file, of_needles = lines(given)
    assert of_file["engine_arguments"]["max_num_seqs"] == 3
    named = ("source", "output_len", "ignore_eos", "seed", "batch_size", "prompt_tokens")
    assert [of_file[name] for name in named] == ["prompts.jsonl", 7, True, 5, 1, {"least": 3, "most": 3}]
    assert (of_needles["source"], of_needles["input_len"], of_needles["rows"]) == ("needle", 300, 2)
    assert len(of_file["data"]) == 16
    assert of_file["data"] != of_needles["data"]


OPTIONS = {"additional_config": {"sparq": {"compression": 4}, "other": 1}}


def test_options_among_engine_arguments_join_those_of_the_method(ray: Cluster, given: list[str]) -> None:
    for name, more in {"sparq+int4": {"read": "sparq", "format": "int4"}, "sparq": {}, "quest": {}}.items():
        method = with_options(Method.named(name), OPTIONS)
        assert method.options == {**more, "compression": 4}
        arguments = engine_arguments(method, gpus=0, kv_cache_mib=None, more=OPTIONS)
        assert arguments["additional_config"] == {"other": 1, "sparq": {**more, "compression": 4}}
        assert arguments == engine_arguments(Method.named(name), gpus=0, kv_cache_mib=None, more=OPTIONS)
    dense = engine_arguments(Method.named("dense"), gpus=0, kv_cache_mib=None, more=OPTIONS)
    assert dense["additional_config"] == {"other": 1}
    assert exit_code(*given, "--methods", "sparq", "--engine-args", json.dumps(OPTIONS)) == 0
    assert [line["options"] for line in lines(given)] == [{}, {"compression": 4}]
    assert lines(given)[1]["engine_arguments"]["additional_config"]["sparq"] == {"compression": 4}


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("int4", {"additional_config": {"sparq": {"format": "int8"}}}, "contradicts the method 'int4', .* 'int4'"),
        ("sparq", {"additional_config": {"sparq": {"read": "spans"}}}, "read 'spans' contradicts the method 'sparq'"),
        ("h2o", {"additional_config": {"sparq": {"retention": "window"}}}, "stands for 'heavy_hitter'"),
        ("sparq", {"additional_config": {"sparq": {"compresion": 4}}}, "compresion"),
        ("sparq", {"additional_config": {"compression": 4}}, "is read by nothing"),
        ("sparq", {"additional_config": {"sparq": 4}}, "must be an object of options"),
        ("dense", {"additional_config": [4]}, "must be an object"),
        ("sparq", {"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN contradicts the method 'sparq'"),
        ("sparq", {"attention_config": {"backend": "KIVI"}}, "KIVI contradicts the method 'sparq'"),
        ("dense", {"attention_backend": "sparq"}, "SPARQ contradicts the method 'dense'"),
        ("sparq", {"model": "m"}, "the model is --model's"),
    ],
)
def test_engine_arguments_that_contradict_a_method(method: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine_arguments(Method.named(method), gpus=0, kv_cache_mib=None, more=more)


def test_engine_arguments_that_agree_with_a_method() -> None:
    agreed = {"attention_backend": "kivi", "additional_config": {"sparq": {"format": "kivi4"}}}
    given = engine_arguments(Method.named("kivi"), gpus=0, kv_cache_mib=None, more=agreed)
    assert (given["attention_backend"], given["additional_config"]) == ("KIVI", {"sparq": {"format": "kivi4"}})
    stock = engine_arguments(Method.named("dense"), gpus=1, kv_cache_mib=None, more={"attention_backend": "FLASH_ATTN"})
    assert stock["attention_backend"] == "FLASH_ATTN"


@pytest.mark.parametrize("broken", [False, True])
def test_generated_prompts_need_a_tokenizer(broken: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(WEIGHTS, model, ignore=lambda folder, names: {"tokenizer.json"} & set(names))
    if broken:
        (model / "tokenizer.json").write_text("{")
    assert exit_code("bench", "ray", "--model", str(model), "--out", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert ("its tokenizer.json cannot be used" if broken else "there is no tokenizer.json in it") in message
    assert "give a folder with config.json, weights and tokenizer, or prompts of your own with --data" in message


def test_actors_ask_vllm_for_preemptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm.LLM` turns them off unless it is told otherwise."""
    made: list[dict[str, Any]] = []
    metrics: Any = SimpleNamespace(num_preemptions=3)

    class Engine:
        llm_engine = SimpleNamespace(vllm_config=None)

        def __init__(self, model: str, **arguments: Any) -> None:
            made.append(arguments)

        def generate(self, texts: list[str], *arguments: Any, **more: Any) -> list[Any]:
            answer = SimpleNamespace(text="t", token_ids=[1])
            return [SimpleNamespace(outputs=[answer], prompt_token_ids=[1], metrics=metrics) for _ in texts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))
    monkeypatch.setattr(actors, "engine_report", lambda config: {})
    monkeypatch.setattr(actors, "proven", lambda method, reports: "a")
    monkeypatch.setattr(replicas, "provenance", lambda: NODE, raising=False)
    replica = actors.Replica(Pool(method=Method.named("dense"), model=WEIGHTS, replicas=1))
    assert made == [{"disable_log_stats": False}]
    asked = [prompts.Prompt(id="0", prompt="x", max_tokens=2, seed=0)]
    (row,) = replica.answer(asked)
    assert (row["preemptions"], json.loads(row["origin"])) == (3, NODE)
    metrics = None
    (row,) = replica.answer(asked)
    assert (
        row["error"] == "RuntimeError: vLLM does not tell how often a request was preempted: its log stats must be on"
    )


def test_ray_data_counts_preemptions_or_fails() -> None:
    row = {"id": "0", "generated_text": "t", "generated_tokens": [1], "num_input_tokens": 1, "num_generated_tokens": 1}
    row |= {"started": 1.0, "finished": 2.0, "attention": "a", "origin": "{}", "replica": "r", "error": ""}
    assert data.answer_of(row | {"metrics": {"num_preemptions": 3}})["preemptions"] == 3
    with pytest.raises(RuntimeError, match="does not tell how often"):
        data.answer_of(row | {"metrics": {}})
    assert data.answer_of(row | {"error": "ValueError: too long"})["error"] == "ValueError: too long"


def test_addresses_that_key_by_this_machine(ray: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, _ = build_parser(["bench", "ray"])
    for address, differs in {"auto": True, "ray://head:10001": False}.items():
        args = parser.parse_args(["bench", "ray", "--address", address])
        keys = set()
        for cpu in ("one", "two"):
            monkeypatch.setattr(records, "device", lambda cpu=cpu: {"cpu": cpu})
            keys.add(ray_case.key_of(args, {"address": address}))
        assert (len(keys) == 2) == differs
