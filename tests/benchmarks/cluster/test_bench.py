"""`vllm-sparq bench ray`: what is refused, how rows are retried, and two replicas beside one engine."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.cluster import replicas_of_a_cluster
from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.cluster import bench as ray_bench
from vllm_sparq.benchmarks.cluster import prompts
from vllm_sparq.benchmarks.cluster import summary as ray_summary
from vllm_sparq.benchmarks.cluster.answers import Answers
from vllm_sparq.benchmarks.cluster.replicas import (
    REPLICA_ENVIRONMENT,
    Pool,
    cluster,
    engine_arguments,
    proven,
    unpacked,
)
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.proof import WrongAttentionError
from vllm_sparq.benchmarks.common.records import provenance
from vllm_sparq.benchmarks.common.server import WORKER_REPORT
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import build_parser, main
from vllm_sparq.console import UsageError


def row(i: int) -> dict[str, Any]:
    """An answer."""
    numbers = {"n_prompt_tokens": 3, "n_tokens": 2, "started": 1.0, "finished": 2.0, "preemptions": 0}
    return {
        "id": str(i),
        "text": f"t{i}",
        "token_ids": [i, 7],
        **numbers,
        "attention": "a",
        "origin": "{}",
        "replica": "r",
    }


POOL = Pool(method=Method.named("sparq"), model=WEIGHTS, replicas=2, retries=2)


def source() -> Iterator[prompts.Prompt]:
    return (prompts.Prompt(id=str(i), prompt="x", max_tokens=2, seed=i) for i in range(10))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--methods", "sparrow"], "unknown method 'sparrow'"),
        (["--replicas", "4096"], "4096 replicas of 1 CPUs need 4096, and this machine has"),
        (["--replicas", "0"], "argument --replicas: '0' must be 1 or more"),
        (["--data", "nowhere.jsonl"], "there is no such file"),
        (["--ship", "nowhere.whl"], "there is no such wheel"),
        (["--input-len", "3"], "--input-len 3: n_tokens=3 is too short"),
        (["--engine-args", '{"disable_log_stats": true}'], "--engine-args disable_log_stats true"),
        (["--engine-args", '{"model": "m"}'], "engine argument model 'm': the model is --model's"),
    ],
)
def test_bad_usage(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "ray", "--out", str(tmp_path / "out"), *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_through_a_ray_client_plain_actors_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "ray", "--address", "ray://127.0.0.1:1", "--runner", "data"]
    assert main(words) == 2
    assert "--runner data does not work with --address ray://127.0.0.1:1" in capsys.readouterr().err
    parser, _ = build_parser(words)
    runners = {
        address: ray_bench.runner_of(parser.parse_args(["bench", "ray", *given]))
        for address, given in {"": [], "ray": words[2:4], "host": ["--address", "h:6379"]}.items()
    }
    assert runners == {"": "data", "ray": "actors", "host": "data"}


def test_a_cluster_that_refuses_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(UsageError, match=r"Failed to connect .* cluster\. One started where .* RAY_AUTH_MODE=token"),
        cluster(POOL, "10.0.0.1:6379"),
    ):
        pass


def test_an_address_that_nobody_listens_at_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound and not listening: a port that refuses
        taken.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        assert main(["bench", "ray", "--address", f"ray://127.0.0.1:{taken.getsockname()[1]}"]) == 2
    assert "nothing answers at 127.0.0.1" in capsys.readouterr().err
    assert time.monotonic() - begin < 10


def test_failed_rows_are_tried_again_and_no_row_is_written_twice(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def ask(todo: Iterable[prompts.Prompt]) -> Iterator[list[dict[str, Any]]]:
        asked.append([one.id for one in todo])
        for id in asked[-1]:
            failed = id in ("3", "7") and len(asked) < 3
            yield [{"id": id, "error": "broken"}] if failed else [row(int(id)) | {"error": ""}] * 2  # a batch repeated

    told: list[int] = []
    with Answers(tmp_path, {}) as store:
        store.add([row(0)])
        store.flush()
        ray_bench.answer_all(POOL, ask, source, store.ids(), store, told.append)
        assert sorted(one["id"] for one in store.rows()) == sorted({str(i) for i in range(10)})
    assert asked == [[str(i) for i in range(1, 10)], ["3", "7"], ["3", "7"]]
    assert told[-1] == 10


def test_rows_that_keep_failing_are_named_and_the_others_kept(tmp_path: Path) -> None:
    def ask(todo: Iterable[prompts.Prompt]) -> Iterator[list[dict[str, Any]]]:
        yield [row(int(p.id)) if p.id != "4" else {"id": "4", "error": "ValueError: too long"} for p in todo]

    with Answers(tmp_path, {}) as store:
        with pytest.raises(
            ray_bench.Incomplete, match="1 rows of sparq failed 3 times; the first is row '4': ValueError"
        ):
            ray_bench.answer_all(POOL, ask, source, set(), store, lambda n: None)
        assert len(store.ids()) == 9


def test_rows_that_vanish_without_an_error_are_missed(tmp_path: Path) -> None:
    def ask(todo: Iterable[prompts.Prompt]) -> Iterator[list[dict[str, Any]]]:
        yield [row(int(prompt.id)) for prompt in todo if prompt.id != "4"]

    missed = "1 rows of sparq got neither an answer nor an error, 3 times: run the command again"
    with Answers(tmp_path, {}) as store, pytest.raises(ray_bench.Incomplete, match=missed):
        ray_bench.answer_all(POOL, ask, source, set(), store, lambda n: None)


def test_a_wrong_attention_below_what_ray_wraps_around_it_is_told(tmp_path: Path) -> None:
    def ask(todo: Iterable[prompts.Prompt]) -> Iterator[list[dict[str, Any]]]:
        yield [row(0)]
        try:
            proven(POOL.method, [{"layer": {"backend": "CPU_ATTN", "impl": "X"}}])
        except WrongAttentionError as error:
            raise RuntimeError("a task failed") from error

    wrong = pytest.raises(WrongAttentionError, match="asked for the backend SPARQ and runs 1 × X")
    with Answers(tmp_path, {}) as store, wrong:
        ray_bench.answer_all(POOL, ask, source, set(), store, lambda n: None)
    with pytest.raises(WrongAttentionError, match="cannot say which attention it runs"):
        proven(POOL.method, AttributeError("attention_report"))


def test_what_a_replica_is_given() -> None:
    dense = engine_arguments(Method.named("dense"), gpus=0, kv_cache_mib=64, more={"max_num_seqs": 4})
    assert dense == {
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "worker_extension_cls": WORKER_REPORT,
        "max_num_seqs": 4,
    }
    assert "worker_extension_cls" not in engine_arguments(Method.named("kivi"), gpus=1, kv_cache_mib=None, more={})
    prompt = next(source())
    assert POOL.sampling(prompt) == {"temperature": 0.0, "max_tokens": 2, "ignore_eos": False}
    warm = Pool(method=POOL.method, model=WEIGHTS, replicas=1, temperature=0.7, runtime_env={"env_vars": {"A": "1"}})
    assert warm.sampling(prompt)["seed"] == 0
    assert warm.environment["env_vars"] == REPLICA_ENVIRONMENT | {"A": "1"}


def test_a_shipped_wheel_goes_as_folders(tmp_path: Path) -> None:
    """Ray would install a wheel together with another vLLM and torch."""
    wheel = tmp_path / "vllm_sparq-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm_sparq/__init__.py", "vllm_sparq/lib/libsparq.so", "vllm_sparq-9.dist-info/entry_points.txt"):
            archive.writestr(name, name)
    package, information = map(Path, unpacked(wheel))
    assert (package.name, information.name) == ("vllm_sparq", "vllm_sparq-9.dist-info")
    assert (information / "entry_points.txt").is_file()
    assert (package / "lib" / "libsparq.so").is_file()
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(UsageError, match="it holds other, not vllm_sparq"):
        unpacked(tmp_path / "other.whl")


def test_rates_count_the_time_in_which_a_replica_worked(tmp_path: Path) -> None:
    spans = [("a", 0.0, 2.0), ("b", 1.0, 4.0), ("c", 100.0, 101.0)]  # c worked in a second sitting
    with Answers(tmp_path, {}) as store:
        store.add([row(i) | {"replica": r, "started": s, "finished": f} for i, (r, s, f) in enumerate(spans)])
        store.flush()
        found = ray_summary.summary(POOL, store, took=9.0)
        assert (found["seconds"], found["n_output_tokens"], found["output_tokens_per_second"]) == (5.0, 6, 1.2)
        assert found["per_replica"]["b"] == {"rows": 1, "output_tokens": 2, "output_tokens_per_second": 0.667}
        store.add([row(9) | {"attention": "another"}])
        store.flush()
        with pytest.raises(WrongAttentionError, match="rows of sparq were made by a, another"):
            ray_summary.summary(POOL, store, took=9.0)


def test_the_table_says_slower_than_dense() -> None:
    from rich.console import Console

    common = {"rows": 4, "model": "m", "replicas": 1, "runner": "data", "per_replica": {"a": {"rows": 4}}}
    common |= {"attention": "x", "preemptions": 0}
    rates = {"sparq": 50.0, "dense": 100.0, "int4": 120.0}
    table = ray_summary.table([common | {"method": m, "output_tokens_per_second": v} for m, v in rates.items()])
    text = io.StringIO()
    Console(width=200, file=text).print(table)
    lines = [line for line in text.getvalue().splitlines() if line.startswith("│ ")]
    assert [line.split()[1] for line in lines] == ["dense", "sparq", "int4"]
    assert ["slower than dense" in line for line in lines] == [False, True, False]


def alone_in_one_engine(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Sampled answers of an engine in this process, by the id of their rows."""
    from vllm import SamplingParams

    from tests.engine.conftest import running_engine

    chosen = [SamplingParams(temperature=0.8, seed=row["seed"], max_tokens=row["max_tokens"]) for row in rows]
    as_replicas = dict(max_model_len=None, max_num_batched_tokens=None, enable_prefix_caching=None)
    with running_engine("sparq", kv_cache_memory_bytes=64 << 20, **as_replicas) as llm:
        outputs = llm.generate([row["prompt"] for row in rows], chosen, use_tqdm=False)
    return {row["id"]: list(output.outputs[0].token_ids) for row, output in zip(rows, outputs, strict=True)}


@pytest.mark.engine
@pytest.mark.parametrize(
    ("n_replicas", "processes"),
    [(1, "1"), pytest.param(2, "1", marks=pytest.mark.long), pytest.param(2, "3", marks=pytest.mark.long)],
)
def test_replicas_answer_as_one_engine_even_when_one_is_killed(n_replicas: int, processes: str, tmp_path: Path) -> None:
    """Sampled answers, too, since every row has its seed. Of two, the replica that answers first is killed.

    An engine is three processes if nobody says otherwise, each of which takes eight seconds to load vLLM.
    """
    data = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"q{i}", "prompt": f"The key of w{i} is {i}. The key of", "seed": i, "max_tokens": 8} for i in range(80)
    ]
    data.write_text("".join(json.dumps(one) + "\n" for one in rows))
    environment = {**os.environ, **REPLICA_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes != "1"))
    environment.pop("VLLM_SPARQ_TESTS_FORK")  # vLLM never forks in Ray's processes
    out, log = tmp_path / "out.json", tmp_path / "log"
    given = data, out, log, environment, n_replicas
    process = multiprocessing.get_context("spawn").Process(target=replicas_of_a_cluster.answer, args=given)
    process.start()
    process.join(500)
    process.kill()
    assert out.is_file(), log.read_text()[-3000:]
    pool = json.loads(out.read_text())
    alone = alone_in_one_engine(rows)
    assert {one["id"]: one["token_ids"] for one in pool["rows"]} == alone
    assert len(pool["rows"]) == len(rows)
    assert not any(one["error"] for one in pool["rows"])
    assert {json.loads(one["origin"])["cpu"] for one in pool["rows"]} == {provenance()["cpu"]}
    assert {one["attention"] for one in pool["rows"]} == {"4 × PagedImpl (SPARQ)"}
    replicas = {one["replica"] for one in pool["rows"]}
    assert len(replicas) >= n_replicas
    assert (pool["killed"] in replicas) == (n_replicas == 2)
