"""`vllm-sparq bench serve`: what it refuses, what a server is given, and the table."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.commands import exit_code
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.server import WORKER_REPORT, ServerError
from vllm_sparq.benchmarks.serving import bench as serve_bench
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import main


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve_bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--methods", "sparrow"], "unknown method 'sparrow'"),
        (["--options", '{"compresion": 4}'], "Did you mean 'compression'?"),
        (
            ["--input-len", "4090"],
            "--input-len 4090 and --output-len 64 need more positions than the 4096 of the model",
        ),
        (
            ["--serve-args", '["--additional_config", "{}"]'],
            "'--additional-config' is set by this command itself: use --",
        ),
        (
            ["--serve-args", '["--attention-backend=KIVI"]'],
            "'--attention-backend' is set by this command itself: use --",
        ),
        (["--serve-args", '["--additional-config.sparq.k", "4"]'], "is set by this command itself: use --methods"),
        (["--serve-args", '["--dtype", "int3"]'], "--dtype 'int3' is not usable"),
        (["--goodput", "ttf:500"], "argument --goodput: 'ttf:500' is no service level: give ttft, tpot, e2el and"),
        (["--goodput", "ttft:500", "tpot"], "argument --goodput: 'tpot' is no service level"),
        (["--goodput", "e2el:fast"], "argument --goodput: 'e2el:fast' is no service level"),
        (["--goodput", "ttft:-1"], "argument --goodput: 'ttft:-1' is no service level"),
        (["--num-prompts", "0"], "argument --num-prompts: '0' must be 1 or more"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("bench", "serve", *words) == 2
    assert message in capsys.readouterr().err


def test_bad_words() -> None:
    for words in (("--request-rate", "fast"), ("--request-rate", "0"), ("--serve-args", "{}"), ("--options", "[]")):
        with pytest.raises(argparse.ArgumentError):
            parse(*words)


def test_all_servers_get_the_same_cache_and_say_what_they_run() -> None:
    args = parse("--kv-cache-mib", "8", "--serve-args", '["--max-num-seqs", "2"]')
    dense, kivi = (serve_bench.serve_arguments(args, Method.named(name)) for name in ("dense", "kivi"))
    for words in (dense, kivi):
        assert words[words.index("--kv-cache-memory-bytes") + 1] == str(8 << 20)
        assert words[-2:] == ["--max-num-seqs", "2"]
    assert dense[dense.index("--worker-extension-cls") + 1] == WORKER_REPORT
    assert kivi[kivi.index("--attention-backend") + 1] == "KIVI"


def test_keys_tell_rates_and_methods_apart() -> None:
    args = parse()
    cases = [(Method.named(name), rate) for name in ("dense", "sparq", "kivi") for rate in (2.0, math.inf)]
    assert len({serve_bench.key_of(args, WEIGHTS, *case) for case in cases}) == len(cases)


def test_a_block_size_of_the_servers_is_part_of_the_case() -> None:
    sparq, given = Method.named("sparq"), ('["--block-size", "64"]', '["--block-size=64"]', '["--max-num-seqs", "2"]')
    layouts = [serve_bench.layout_of(parse("--serve-args", words), WEIGHTS, sparq) for words in given]
    assert [layout.block_size for layout in layouts] == [64, 64, 128]


@pytest.mark.parametrize("words", ['["--dtype", "float32"]', '["--dtype=float32"]', '["--dtype", "float"]'])
def test_bytes_are_those_of_the_type_that_runs(words: str) -> None:
    dense = Method.named("dense")
    usual, wide = (serve_bench.layout_of(parse("--serve-args", one), WEIGHTS, dense) for one in ("[]", words))
    assert wide.kv_bytes_per_token == 2 * usual.kv_bytes_per_token


def test_a_context_is_given_in_both_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(serve_bench.CacheLayout, "of", lambda *rest, max_model_len, **more: given.append(max_model_len))
    for words in ('["--max-model-len", "512"]', '["--max_model_len", "512"]', '["--max_model_len=512"]'):
        serve_bench.layout_of(parse("--serve-args", words), WEIGHTS, Method.named("sparq"))
    assert given == [512, 512, 512]


@pytest.mark.parametrize("fails", [True, False])
def test_rates_that_were_measured_are_shown(
    fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = {"kv_capacity_tokens": 1000, "preemptions": 0, "prefix_cache_hit_rate": 0.0, "attention": "4 × Impl"}

    def measure(args: object, model: object, method: Method, *rest: object) -> Iterator[dict[str, object]]:
        if fails and method.name == "sparq":
            raise ServerError("it fell")
        rate = {
            "model": "m",
            "num_prompts": 4,
            "mean_ttft_ms": 1.0,
            "mean_tpot_ms": 2.0,
            "p99_itl_ms": 3.0,
            "rate": "inf",
        }
        yield {**rate, "sparq": server, "method": method.name, "output_throughput": 98.7}

    monkeypatch.setattr(serve_bench, "measure", measure)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["bench", "serve"]) == fails
    said = capsys.readouterr().out
    assert "98.7" in said
    assert ("it fell" in said) == fails == bool(list(tmp_path.iterdir()))


def test_each_rate_has_prompts_of_its_own_in_any_order() -> None:
    seeds = {rate: serve_bench.seed_of(7, rate) for rate in (4.0, 16.0, math.inf, serve_bench.WARM_UP)}
    assert len(set(seeds.values())) == len(seeds)
    assert serve_bench.seed_of(7, 4.0) == seeds[4.0] != serve_bench.seed_of(8, 4.0)


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("order", ["16,4", "4,16"])
def test_no_rate_is_answered_from_the_cache_of_another(order: str, tmp_path: Path) -> None:
    """Prompts of several blocks, which a rate with the seed of the one before it would find."""
    out = tmp_path / "serve.jsonl"
    words = ["--methods", "dense", "--request-rate", order, "--num-prompts", "6", "--input-len", "300"]
    assert main(["bench", "serve", *words, "--output-len", "4", "--kv-cache-mib", "64", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["rate"] for line in lines] == [float(rate) for rate in order.split(",")]
    assert [line["sparq"]["prefix_cache_hit_rate"] for line in lines] == [0.0, 0.0]
    assert all(line["block_size"] == 128 for line in lines)


def test_the_table_says_slower_than_dense() -> None:
    server = {"kv_capacity_tokens": 1000, "preemptions": 0, "prefix_cache_hit_rate": 0.0, "attention": "4 × Impl"}
    common = {"model": "m", "num_prompts": 4, "mean_ttft_ms": 1.0, "mean_tpot_ms": 2.0, "p99_itl_ms": 3.0}
    common |= {"sparq": server, "rate": "inf"}
    rates = {"kivi": 50.0, "dense": 100.0, "sparq": 200.0}
    rows = [common | {"method": method, "output_throughput": rate} for method, rate in rates.items()]
    text = io.StringIO()
    Console(file=text, width=200).print(serve_bench.table(rows, [math.inf]))
    lines = {name: line for line in text.getvalue().splitlines() for name in rates if f"│ {name} " in line}
    assert ["slower than dense" in lines[name] for name in ("dense", "kivi", "sparq")] == [False, True, False]
