"""`vllm-sparq bench ops --beside`: calls go to the other build, and what cannot be compared is told in a line."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from vllm_sparq.benchmarks.ops import bench as ops_bench
from vllm_sparq.benchmarks.ops import builds
from vllm_sparq.benchmarks.ops.cell import Call, Tensors
from vllm_sparq.benchmarks.ops.methods import METHODS
from vllm_sparq.benchmarks.ops.stopwatch import Stopwatch
from vllm_sparq.console import UsageError
from vllm_sparq.ops import native
from vllm_sparq.ops.dispatch import OVERRIDE

from .test_bench import parse, settled

SMALL = ("--shape", "4/2/64", "--context", "300,1024", "--repeats", "4", "--k", "64")


def compile_idle(folder: Path, abi: int) -> Path:
    """A library with our name and an interface, whose ops count their calls and write nothing."""
    library = native.find().library
    assert library is not None
    source, path = folder / "idle.c", folder / library.name
    names = ("sparq_dense_decode", "sparq_sparq_decode", "sparq_prefill")
    source.write_text(
        "static int calls;\nint calls_made(void) { return calls; }\n"
        f"unsigned long long sparq_abi(void) {{ return {abi}ull; }}\n"
        + "".join(f"void {name}(void) {{ ++calls; }}\n" for name in names)
    )
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


@pytest.fixture
def idle(tmp_path: Path) -> Path:
    return compile_idle(tmp_path, native.abi())


@pytest.mark.parametrize("method", ["dense", "sparq"])
def test_ops_call_the_other_build_within_and_ours_after(idle: Path, method: str) -> None:
    (cell,) = ops_bench.cells(settled("--shape", "4/2/64", "--context", "1024", "--k", "64"))
    tensors = Tensors.build(cell)
    (call,) = METHODS[method].calls(tensors)
    tensors.out.fill_(7)
    with native.another_build(idle):
        call.run()
    assert (tensors.out == 7).all()
    call.run()
    assert (tensors.out != 7).all()


def test_ours_again_after_an_error(idle: Path) -> None:
    ours, seen = native.function("sparq_dense_decode"), []
    with contextlib.suppress(KeyError), native.another_build(idle):
        seen.append(native.function("sparq_dense_decode"))
        raise KeyError
    assert seen[0] is not ours
    assert native.function("sparq_dense_decode") is ours


@pytest.mark.parametrize(
    ("words", "cells", "methods"),
    [
        (("--methods", "dense,sparq"), 2, ("dense", "sparq")),
        (("--op", "prefill", "--chunk", "32", "--context", "0", "--methods", "dense"), 1, ("dense",)),
    ],
)
def test_every_round_calls_the_other_build_once(
    idle: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], cells: int, methods: tuple[str, ...]
) -> None:
    assert ops_bench.main(parse(*SMALL, *words, "--beside", str(idle.parent))) == 0
    assert ctypes.CDLL(str(idle)).calls_made() == 4 * cells * len(methods)
    shown = capsys.readouterr().out
    assert len(re.findall(rf" (?:{'|'.join(methods)}) .* [\d.]+x ", shown)) == cells * len(methods)


def test_both_builds_have_a_sample_a_round(idle: Path) -> None:
    call, rounds = Call("add", lambda: native.function("sparq_dense_decode")), []
    (pair,) = builds.measure("cell", {"dense": call}, idle, 5, Stopwatch("wall", 1), lambda: rounds.append(1))
    assert len(pair.this) == len(pair.other) == len(rounds) == 5


def test_ratios_are_of_one_round() -> None:
    pair = builds.Pair("cell", "dense", this=[1.0, 10.0, 2.0], other=[2.0, 10.0, 1.0])
    assert pair.ratios == [0.5, 1.0, 2.0]


def test_methods_are_ours_unless_named() -> None:
    args = settled("--context", "1024", "--beside", "there")
    assert args.methods == [name for name in METHODS if name != "vllm"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--methods", "vllm,dense"), "--beside compares kernels of ours: leave vllm out of --methods"),
        (("--out", "lines.jsonl"), "which makes no record: leave --out out"),
        ((), "holds no libsparq_.*: give the vllm_sparq/lib of another build"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ops_bench.main(parse(*SMALL, *words, "--beside", str(tmp_path)))


def test_no_kernels_are_in_use(idle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the reference would be compared with itself."""
    monkeypatch.setenv(OVERRIDE, "reference")
    with pytest.raises(UsageError, match=f"compares compiled kernels, and none are in use: .*{OVERRIDE}"):
        ops_bench.main(parse(*SMALL, "--beside", str(idle.parent)))


def test_another_interface(tmp_path: Path) -> None:
    compile_idle(tmp_path, native.abi() ^ 1)
    with pytest.raises(UsageError, match=r"--beside .* has the C interface .* but this version of vllm-sparq calls"):
        ops_bench.main(parse(*SMALL, "--beside", str(tmp_path)))
