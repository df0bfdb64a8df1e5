"""Which library a machine gets, and what is said where it can have none: x86, Arm and others, whatever runs this."""

from __future__ import annotations

import platform
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import ROOT
from vllm_sparq.doctor.findings import Section
from vllm_sparq.doctor.machine import describe_cpu
from vllm_sparq.ops import instruction_sets, native

AVX2 = {"avx2", "fma", "f16c", "bmi2"}

NEOVERSE = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n"


@pytest.fixture(autouse=True)
def _find_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    native.find.cache_clear()
    yield
    native.find.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str]) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: flags)


def test_what_runs_here_is_of_this_architecture() -> None:
    here = instruction_sets.runnable()
    assert {instruction_sets.INSTRUCTION_SETS[isa].machine for isa in here} <= {platform.machine()}
    assert ("neon" in here) == (platform.machine() == "aarch64")


def test_the_best_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64", AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"})
    assert instruction_sets.runnable() == ["avx512", "avx2"]
    pretend(monkeypatch, "x86_64", instruction_sets.INSTRUCTION_SETS["avx512"].flags | {"avx512_vnni"})
    assert instruction_sets.runnable() == ["avx512_vnni", "avx512", "avx2"]  # Cascade Lake, Ice Lake
    pretend(monkeypatch, "aarch64", {"asimd"})
    assert instruction_sets.runnable() == ["neon"]


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_are_for_processes_that_linux_grants_them(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Using AMX's registers without that would end in SIGILL."""
    flags = instruction_sets.INSTRUCTION_SETS["amx"].flags
    monkeypatch.setattr(instruction_sets, "_cpuinfo", lambda name: " ".join(flags) if name == "flags" else "")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instruction_sets, "_grants_tiles", lambda: granted)
    assert instruction_sets.runnable() == ["amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"][not granted :]
    assert instruction_sets.lacking("amx") == (None if granted else "it lacks amx_tile")


@pytest.mark.parametrize(
    ("machine", "flags", "asked", "said"),
    [
        ("x86_64", AVX2, "sse2", r"is not an instruction set: use one of \['amx', 'avx512_bf16', 'avx512_vnni', .*"),
        (
            "x86_64",
            AVX2,
            "avx512",
            r"cannot run on this CPU: it lacks avx512bw, .*; use one of \['avx2'\], or unset it",
        ),
        (
            "x86_64",
            AVX2,
            "neon",
            r"cannot run .*: it is of aarch64, and this is x86_64; use one of \['avx2'\], or unset",
        ),
        (
            "aarch64",
            {"asimd"},
            "avx2",
            r"cannot run .*: it is of x86_64, and this is aarch64; use one of \['neon'\], or",
        ),
        ("riscv64", set(), "neon", r"cannot run .*: it is of aarch64, and this is riscv64; unset it"),
    ],
)
def test_what_the_cpu_cannot_run_is_refused(
    machine: str, flags: set[str], asked: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading such a library would end in SIGILL, or in an error of the loader."""
    pretend(monkeypatch, machine, flags)
    monkeypatch.setenv(native.OVERRIDE, asked)
    with pytest.raises(ValueError, match=rf"{native.OVERRIDE}='{asked}' {said}"):
        native.find()


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ("x86_64", "this CPU has no AVX2, which every compiled kernel needs; the pure-torch reference runs instead"),
        ("riscv64", "there are compiled kernels for aarch64 and x86_64, and this is riscv64; the pure-torch reference"),
    ],
)
def test_where_nothing_runs_it_is_said(machine: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, machine, set())
    found = native.find()
    assert (found.library, found.isa) == (None, None)
    assert found.reason.startswith(said)
    section = Section("device")
    describe_cpu(section)
    assert section.numbers["instruction_sets"] == []


def test_doctor_names_the_instruction_set_of_an_arm_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux prints no name of such a CPU, but numbers for its maker and its kind."""
    (info := tmp_path / "cpuinfo").write_text(NEOVERSE.format(part="0xd40"))
    monkeypatch.setattr(instruction_sets, "_CPUINFO", info)
    pretend(monkeypatch, "aarch64", {"asimd"})
    section = Section("device")
    describe_cpu(section)
    assert section.numbers["cpu"] == "Arm Neoverse V1"
    assert section.numbers["instruction_sets"] == ["NEON"]
    info.write_text(NEOVERSE.format(part="0xfff"))
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert instruction_sets.cpu_name() == "aarch64"


@pytest.mark.skipif(platform.machine() != "aarch64", reason="Arm's way to ask for them")
def test_arm_is_asked_what_it_has() -> None:
    assert "asimd" in instruction_sets.cpu_flags()


def test_setup_knows_the_same_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot ask the package: it runs before there is one."""
    setuptools = pytest.importorskip("setuptools", reason="builds the package, which an emulated Python does not")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    compiled = runpy.run_path("setup.py")["INSTRUCTION_SETS"]
    machines = {known.machine for known in instruction_sets.INSTRUCTION_SETS.values()}
    assert {machine: set(sets) for machine, sets in compiled.items()} == {
        machine: set(instruction_sets.of_machine(machine)) for machine in machines
    }
