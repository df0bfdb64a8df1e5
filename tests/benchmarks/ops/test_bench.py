"""`vllm-sparq bench ops`: what it refuses, what it writes, and how it sums up."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from platform import machine

import pytest
import torch

from vllm_sparq.benchmarks.ops import bench as ops_bench
from vllm_sparq.benchmarks.ops import decode
from vllm_sparq.benchmarks.ops.cell import Cell, Tensors
from vllm_sparq.benchmarks.ops.methods import METHODS
from vllm_sparq.benchmarks.ops.vllm_op import vllm_kernel
from vllm_sparq.config import Options
from vllm_sparq.console import UsageError
from vllm_sparq.formats import QUANTIZED
from vllm_sparq.ops.dense_decode.reference import cached_tokens
from vllm_sparq.ops.native import OVERRIDE


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    ops_bench.add_arguments(parser)
    return parser.parse_args(words)


def settled(*words: str) -> argparse.Namespace:
    args = parse(*words)
    ops_bench.settle(args)
    return args


SMALL = ("--shape", "4/2/64", "--context", "300,1024", "--k", "64", "--repeats", "3", "--methods", "dense,sparq,write")


def test_defaults_are_a_known_model() -> None:
    args = settled("--context", "1024,4096")
    found = ops_bench.cells(args)
    assert args.methods == list(METHODS)
    assert [(c.context, c.batch, c.heads, c.kv_heads, c.head_dim) for c in found] == [
        (1024, 1, 32, 8, 128),
        (4096, 1, 32, 8, 128),
    ]
    assert (found[0].read.r, found[0].read.min_k, found[0].read.alpha_floor) == (16, 256, 1.0)
    assert not found[0].read.is_dense(1024)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--shape", "32-8-128"), "'32-8-128' is not H/G/D"),
        (("--shape", "32/6/128"), "6 KV heads do not divide 32 query heads"),
        (("--shape", "32/8/100"), "head size 100 is not a multiple of 16"),
        (("--context", "1k"), "'1k' is not a list of numbers"),
        (("--batch", "1,0"), "holds a number below 1"),
        (("--k", "0"), "'0' must be 1 or more"),
        (("--methods", "dense,spark"), "unknown method 'spark': use some of vllm,dense,int8,"),
    ],
)
def test_bad_words_are_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=says):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--r", "129"), "--r 129 must be 1 to the head size, 128"),
        (("--block-size", "100"), "--block-size 100 cannot be cut into pages: give a multiple of 16"),
        (("--context", "1000000000"), r"needs about \d+.* GB, and .* GB are free"),
    ],
)
def test_impossible_cells_are_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ops_bench.cells(settled(*words))


def test_processor_time_needs_threads_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(UsageError, match="OMP_WAIT_POLICY=passive"):
        ops_bench.main(parse(*SMALL, "--clock", "cpu"))


def test_a_run_writes_a_line_per_method_and_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.jsonl"
    assert ops_bench.main(parse(*SMALL, "--out", str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["context"], row["method"]) for row in rows] == [
        (s, method) for s in (300, 1024) for method in ("dense", "sparq", "write")
    ]
    for row in rows:
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_us"] / 1e3, rel=0.05, abs=1e-3)
        assert row["bandwidth_gb_per_s"] > 0
        assert row["speedup_vs_vllm"] is None
        assert (row["speedup_vs_dense"] is None) == (row["method"] == "write")
        assert {"impl", "threads", "dtype", "r", "k", "ranking", "cpu", "isa", "torch", "commit", "dirty"} <= set(row)
    assert rows[0]["speedup_vs_dense"] == 1
    assert "SparQ beats our dense op" in capsys.readouterr().out


def test_two_block_sizes_are_two_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.jsonl"
    words = ("--shape", "4/2/64", "--context", "300", "--k", "48", "--repeats", "2", "--methods", "dense,sparq")
    assert ops_bench.main(parse(*words, "--block-size", "32,64", "--out", str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["method"], row["block_size"]) for row in rows] == [
        *(("dense", 32), ("sparq", 32)),
        *(("dense", 64), ("sparq", 64)),
    ]
    # a token is 256 bytes, and 32 of ranking copy; 64 channels have 4 bytes of scale and 4 of the sum of V per block
    assert [row["kv_bytes_per_token"] for row in rows[1::2]] == [256 + 32 + 64 * 8 // n for n in (32, 64)]
    assert len({row["key"] for row in rows}) == 4
    assert ops_bench.main(parse(*words, "--block-size", "64", "--out", str(out))) == 0
    assert "1 of 1 cells: on record already" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 4


def test_bytes_by_hand() -> None:
    # H/G/D = 4/2/64, S = 1024, bf16: a token of a KV head is 2 * 64 * 2 = 256 bytes.
    cell = ops_bench.cells(settled("--shape", "4/2/64", "--context", "1024", "--batch", "3", "--r", "16", "--k", "63"))[
        0
    ]
    assert METHODS["dense"].bytes_moved(cell) == 3 * 2 * 1024 * 256
    # int4: half a byte per token and channel, 4 bytes of range per block and channel, 64 tokens in full.
    assert METHODS["sparq"].bytes_moved(cell) == 3 * 2 * (1024 * 16 // 2 + 8 * 16 * 4 + 64 * 256)
    assert METHODS["write"].bytes_moved(cell) == 3 * 2 * 256 * 2
    # int8: 64 bytes and one 2-byte step, twice. int4: 32 bytes, and step and zero of one group of 64, twice.
    assert METHODS["int8"].bytes_moved(cell) == 3 * 2 * 1024 * 2 * (64 + 2)
    assert METHODS["int4"].bytes_moved(cell) == 3 * 2 * 1024 * 2 * (32 + 4)
    # kivi2: 16 bytes of codes, and 4 bytes of range per 32 elements, for K as for V. It ranks by itself.
    assert METHODS["kivi2"].bytes_moved(cell) == 3 * 2 * 1024 * 2 * (16 + 8)
    assert METHODS["sparq+kivi2"].bytes_moved(cell) == 3 * 2 * (1024 * 16 // 4 + 32 * 16 * 4 + 64 * 48)
    assert METHODS["sparq+int4"].bytes_moved(cell) == 3 * 2 * (1024 * 16 // 2 + 8 * 16 * 4 + 64 * 72)
    # 64 spans with two rows of 64 channels in bf16, and of these the tokens of 63 // 16 = 3.
    assert METHODS["quest"].bytes_moved(cell) == 3 * 2 * (64 * 256 + 48 * 256)
    assert METHODS["quest+kivi2"].bytes_moved(cell) == 3 * 2 * (64 * 256 + 48 * 48)


def test_spans_are_read(tmp_path: Path) -> None:
    out = tmp_path / "ops.jsonl"
    words = ("--shape", "4/2/64", "--context", "300", "--k", "48", "--repeats", "2", "--methods", "quest,quest+int4")
    assert ops_bench.main(parse(*words, "--out", str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # 300 tokens are 19 spans; 3 are read, of which the newest holds 12 tokens.
    assert [row["bytes_moved"] for row in rows] == [2 * (300 * 16 + 44 * 256), 2 * (300 * 16 + 44 * 72)]


def test_requests_own_pages_and_hold_tokens() -> None:
    words = ("--shape", "2/1/64", "--context", "200", "--batch", "2", "--k", "9")
    tensors = Tensors.build(ops_bench.cells(settled(*words))[0])
    cache = tensors.cache("model")
    assert sorted(cache.block_table.flatten().tolist()) == [0, 1, 2, 3]
    first, second = cache.pages.keys[cache.block_table.long()].flatten(1, 3)[..., : 200 // 128, :]
    assert first.equal(second)
    assert first.any()


@pytest.mark.parametrize("format", QUANTIZED)
def test_random_pages_stand_for_plausible_tokens(format: str) -> None:
    words = ("--shape", "2/1/64", "--context", "300", "--batch", "2", "--k", "9")
    tensors = Tensors.build(ops_bench.cells(settled(*words))[0])
    cache = tensors.cache(format)
    keys, values = cached_tokens(cache.pages, cache.block_table[1], 300, 0)
    for x in (keys, values):
        assert x.isfinite().all()
        assert 0.5 < x.std() < 3
    assert not keys[:128].equal(keys[128:256])


def test_break_even_is_the_last_crossing() -> None:
    def row(context: int, ratio: float, batch: int = 1, method: str = "sparq") -> dict:
        shape = dict(batch=batch, heads=4, kv_heads=2, head_dim=64, block_size=128)
        return dict(method=method, context=context, speedup_vs_dense=ratio, **shape)

    ours = [row(512, 1.2), row(1024, 0.9), row(2048, 1.1), row(4096, 3.0), row(512, 0.5, method="dense")]
    assert decode.break_even([*ours, row(4096, 0.8, batch=8), row(2048, 2.0, batch=8)]) == {
        (1, 4, 2, 64, 128): 2048,
        (8, 4, 2, 64, 128): None,
    }


CHUNK = ("--op", "prefill", "--shape", "4/2/64", "--context", "0,128", "--chunk", "96", "--repeats", "2")


def test_a_chunk_of_a_prompt_is_timed_over_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.jsonl"
    assert ops_bench.main(parse(*CHUNK, "--methods", "dense,int4,kivi2", "--out", str(out))) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    methods = ("dense", "int4", "kivi2")
    assert [(row["context"], row["method"]) for row in rows] == [(s, method) for s in (0, 128) for method in methods]
    # Row i sees i + 1 tokens and those before: q K and P V, 4 heads of 64.
    assert [row["multiply_adds"] for row in rows[::3]] == [
        2 * 4 * 64 * n for n in (96 * 97 // 2, 96 * 97 // 2 + 96 * 128)
    ]
    for row in rows:
        assert (row["bench"], row["chunk"], row["block_size"]) == ("ops_prefill", 96, 128)
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert 0 < row["gmac_per_s"] < 1.2 * row["peak_gmac_per_s"]
        assert row["share_of_bound"] == pytest.approx(row["gmac_per_s"] / row["peak_gmac_per_s"], abs=0.02)
        assert {"impl", "threads", "clock", "cpu", "isa", "commit", "dirty"} <= set(row)
    assert len({row["key"] for row in rows}) == len(rows)
    assert "GMAC/s" in capsys.readouterr().out
    ops_bench.main(parse(*CHUNK, "--methods", "dense,int4,kivi2", "--out", str(out)))
    assert "2 of 2 cells: on record already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("--op", "prefill", "--methods", "sparq"),
            "--methods sparq: prompts are read densely.*use some of vllm,dense,",
        ),
        (("--op", "prefill", "--context", "100"), "--context 100 is not in whole blocks of 128: .*; use 0, or another"),
        (("--context", "0"), "--context 0: a decode step sees its own token"),
    ],
)
def test_what_an_op_cannot_time_is_refused(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ops_bench.main(parse(*words))


def test_chunks_are_attention() -> None:
    """What is timed is right: rows of a chunk see what came before, and each other up to themselves."""
    args = settled("--op", "prefill", "--shape", "2/1/64", "--context", "128", "--chunk", "16", "--dtype", "fp32")
    (chunk,) = ops_bench.OPS["prefill"].cells(args)
    t = chunk.tensors()
    (call,) = chunk.calls("dense", t)
    call.run()
    assert t.out.isfinite().all()
    assert torch.equal(t.query_start_loc, torch.tensor([0, 16], dtype=torch.int32))
    first = t.out[:1].clone()
    t.key[1:].zero_(), t.value[1:].zero_()
    call.run()
    assert torch.equal(t.out[:1], first)
    assert not torch.equal(t.out[1:2], first)


@pytest.mark.skipif(machine() != "x86_64", reason="AMX is of x86")
@pytest.mark.parametrize(("isa", "kernel"), [(None, "amx"), ("avx512_bf16", "vec"), ("avx2", "vec")])
def test_vllm_takes_its_kernel_of_the_same_instruction_set(
    isa: str | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AMX, which a process must ask Linux for: no linear layer has done so before `bench ops`."""
    cell = Cell(
        context=64, batch=1, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, options=Options(), block_size=64
    )
    grants = [False, True]
    monkeypatch.delenv(OVERRIDE, raising=False)
    if isa:
        monkeypatch.setenv(OVERRIDE, isa)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", grants.pop)
    assert vllm_kernel(cell, 64) == kernel
    assert (grants == [False]) == (kernel == "amx")
    if kernel == "amx":
        with pytest.raises(RuntimeError, match="which Linux does not grant: take --dtype fp16 or fp32"):
            vllm_kernel(cell, 64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--methods", "vllm", "--shape", "16/16/16"],
            "--methods vllm: none of them runs 16/16/16, batch 1, 64 tokens",
        ),
        (["--methods", "sparq", "--k", "2000000000"], "sparq option k=2000000000 is not usable"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(words: list[str], message: str) -> None:
    """In a process of its own, as a user does: the first case loads vLLM's kernels, which two tests cannot share."""
    start = "import sys; from vllm_sparq.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "bench", "ops", "--context", "64", "--repeats", "1", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
