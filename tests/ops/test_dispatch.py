"""Which implementation runs, that each of them is there, and the kernels of every instruction set of this CPU."""

from __future__ import annotations

import importlib
import inspect
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.test_checks import CONTRACTS, arguments
from vllm_sparq.ops import instruction_sets, native
from vllm_sparq.ops.dispatch import IMPLEMENTATIONS, OVERRIDE, Choice, choose

ROWS = [(op, implementation) for op, rows in IMPLEMENTATIONS.items() for implementation in rows]
RUNNABLE = instruction_sets.runnable()


def test_the_table_is_whole() -> None:
    assert set(IMPLEMENTATIONS) == {"write", "prefill", "dense_decode", "sparq_decode", "quest_decode", "evict"}
    for op, rows in IMPLEMENTATIONS.items():
        assert list(rows) == ["reference", "cpu", "triton"]
        for implementation, where in rows.items():
            assert where == f"vllm_sparq.ops.{op}.{implementation}:{op}"


@pytest.mark.parametrize(("op", "implementation"), ROWS)
def test_every_row_has_the_signature_of_its_contract(op: str, implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    contract = inspect.signature(getattr(importlib.import_module(f"vllm_sparq.ops.{op}"), op))
    assert inspect.signature(Choice(op, implementation, "test").load()) == contract


@pytest.mark.skipif(not (shutil.which("g++") or os.environ.get("CXX")), reason="no C++ compiler")
@pytest.mark.parametrize("isa", instruction_sets.of_machine(platform.machine()))
def test_the_kernels_are_built(isa: str) -> None:
    """Without this, a machine that can compile them would skip every test of the kernels and look green."""
    path = native.LIBRARIES / f"libsparq_{isa}.so"
    assert path.is_file(), f"{path} is missing although there is a C++ compiler: python setup.py build_ext --inplace"
    sources = [p for p in (native.LIBRARIES.parent / "csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    newest = max(sources, key=lambda p: p.stat().st_mtime, default=path)  # an installed package has no sources
    assert path.stat().st_mtime >= newest.stat().st_mtime, f"{path} is older than {newest}: build the kernels again"


@pytest.mark.parametrize("op", [op for op in IMPLEMENTATIONS if "cpu" in IMPLEMENTATIONS[op]])
def test_the_best_kernels_are_chosen_on_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    found, choice = native.find(), choose(op, "cpu")
    assert choice.op == op
    assert choice.reason == found.reason
    assert choice.implementation == ("reference" if found.library is None else "cpu")
    if RUNNABLE and found.library is not None and not os.environ.get(native.OVERRIDE):
        assert found.isa == RUNNABLE[0]


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_without_kernels_it_is_the_reference_and_says_so(
    op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    native.find.cache_clear()
    try:
        choice = choose(op, "cpu")
        assert choice.implementation == "reference"
        assert "reference" in choice.reason
        assert "hundreds of times slower" in choice.reason
    finally:
        native.find.cache_clear()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_cuda_is_triton(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert choose(op, "cuda") == Choice(op, "triton", "CUDA device")


@pytest.mark.parametrize("device", ["cpu", "cuda", "tpu"])
def test_override(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "reference")
    assert choose("write", device) == Choice("write", "reference", f"forced by {OVERRIDE}")
    monkeypatch.setenv(OVERRIDE, "fast")
    with pytest.raises(ValueError, match=rf"{OVERRIDE}='fast' .*\['reference', 'cpu', 'triton'\]"):
        choose("write", device)


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    with pytest.raises(NotImplementedError, match="write for device 'xpu': vllm-sparq runs on cpu and cuda"):
        choose("write", "xpu")


@pytest.mark.parametrize("op", CONTRACTS)
def test_contracts_run_what_is_chosen_with_all_they_are_given(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contract asks for its own op on the device of its tensors, and hands over every argument."""
    asked: list[tuple[str, str]] = []
    run = inspect.signature(Choice(op, "reference", "test").load())
    handed: dict[str, Any] = {}

    class Chosen(Choice):
        def load(self) -> Callable[..., None]:
            return lambda *args, **kw: handed.update(run.bind(*args, **kw).arguments)

    def spy(op: str, device: str) -> Chosen:
        asked.append((op, device))
        return Chosen(op, "reference", "test")

    contract = CONTRACTS[op]
    monkeypatch.setattr(sys.modules[contract.__module__], "choose", spy)
    optional = {
        "sinks": torch.zeros(4),
        "soft_cap": 5.0,
        "key_start_loc": torch.tensor([0, 5, 6], dtype=torch.int32),
        "first_positions": torch.zeros(2, dtype=torch.int32),
    }
    names = inspect.signature(contract).parameters
    given = arguments(op) | {name: value for name, value in optional.items() if name in names}
    assert given.keys() == names.keys()
    contract(**given)
    assert asked == [(op, "cpu")]
    assert handed.keys() == given.keys()
    assert all(handed[name] is value for name, value in given.items())


OTHERS = [
    pytest.param(isa, marks=pytest.mark.long) if isa in ("avx512", "avx512_vnni") else isa
    for isa in (RUNNABLE[1:] if not os.environ.get(native.OVERRIDE) else [])
]
"""Instruction sets that the rest of the suite does not run with; those in between, all of whose parts another set has
too, in `make test-long`."""


ABOUT_CHOOSING = ("test_dispatch.py", "test_instruction_sets.py", "test_native.py")
"""Files of this folder that ask which library is loaded, and not what it computes."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets_pass_the_op_tests(isa: str) -> None:
    """Every case of this folder that runs the kernels of the CPU, in a process that loads the library of ``isa``."""
    if native.find().library is None:
        pytest.skip(f"no CPU kernels: {native.find().reason}")
    here = Path(__file__).parent
    others = [f"--ignore={here / name}" for name in ABOUT_CHOOSING]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(here),
            *others,
            "-q",
            "-x",
            "-k",
            "cpu or turned",
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, native.OVERRIDE: isa},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in summary
    assert "skipped" not in summary, summary


def test_the_interpreter_is_on_without_cuda() -> None:
    """Else the Triton rows of this folder would not run at all."""
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
