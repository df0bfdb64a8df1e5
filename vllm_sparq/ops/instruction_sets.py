"""The instruction sets that the CPU kernels are compiled for, and which of them this CPU has."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AVX512_BF16 = _AVX512_VNNI | {"avx512_bf16"}

_CPUINFO = Path("/proc/cpuinfo")

_ARCH_PRCTL, _ASK_FOR_REGISTERS, _TILES = 158, 0x1023, 18  # Linux's system call, ARCH_REQ_XCOMP_PERM, XTILEDATA

_AT_HWCAP = 16  # of getauxval: bits of <asm/hwcap.h>
_HWCAP_ASIMD = 1 << 1

_ARM_CPUS = {
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0c"): "Arm Neoverse N1",
    ("0x41", "0xd40"): "Arm Neoverse V1",
    ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1A",
}
"""(implementer, part) as Linux prints them, where it prints no name: its <asm/cputype.h>."""


@dataclass(frozen=True)
class InstructionSet:
    """What one library is compiled for.

    Attributes:
        label: its name for people.
        machine: the architecture, as `platform.machine` has it.
        flags: what a CPU must have, as Linux names it in /proc/cpuinfo.
    """

    label: str
    machine: str
    flags: frozenset[str]


INSTRUCTION_SETS = {
    "amx": InstructionSet("AVX-512 with AMX", "x86_64", _AVX512_BF16 | {"amx_tile", "amx_bf16"}),
    "avx512_bf16": InstructionSet("AVX-512 with BF16", "x86_64", _AVX512_BF16),
    "avx512_vnni": InstructionSet("AVX-512 with VNNI", "x86_64", _AVX512_VNNI),
    "avx512": InstructionSet("AVX-512", "x86_64", _AVX512),
    "avx2": InstructionSet("AVX2", "x86_64", _AVX2),
    "neon": InstructionSet("NEON", "aarch64", frozenset({"asimd"})),
}
"""isa -> what it is; of each architecture the best first. `setup.py` has the compiler's options for each."""


def of_machine(machine: str) -> list[str]:
    """The instruction sets of an architecture, the best first."""
    return [isa for isa, known in INSTRUCTION_SETS.items() if known.machine == machine]


def runnable() -> list[str]:
    """Those that this CPU has, the best first."""
    flags = cpu_flags()
    return [isa for isa in of_machine(platform.machine()) if INSTRUCTION_SETS[isa].flags <= flags]


def cpu_flags() -> set[str]:
    """What the first CPU has, as Linux names it, and grants; empty on other systems and architectures."""
    machine = platform.machine()
    if sys.platform != "linux":
        return set()
    if machine == "aarch64":  # asks the kernel, since /proc/cpuinfo of an emulated process is that of its host
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return {"asimd"} if getauxval(_AT_HWCAP) & _HWCAP_ASIMD else set()
    flags = set(_cpuinfo("flags").split()) if machine == "x86_64" else set()
    return flags if "amx_tile" not in flags or _grants_tiles() else flags - {"amx_tile"}


@functools.cache
def _grants_tiles() -> bool:
    """Whether Linux lets this process use AMX's registers, which a process has to ask for."""
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_REGISTERS, _TILES) == 0)


def cpu_name() -> str:
    """The model of the first CPU, as well as Linux knows it."""
    arm = _ARM_CPUS.get((_cpuinfo("CPU implementer"), _cpuinfo("CPU part")))
    return _cpuinfo("model name") or arm or platform.processor() or platform.machine()


def lacking(isa: str) -> str | None:
    """Why this CPU cannot run an instruction set, in words; None if it can."""
    wanted, here = INSTRUCTION_SETS[isa], platform.machine()
    if wanted.machine != here:
        return f"it is of {wanted.machine}, and this is {here}"
    missing = sorted(wanted.flags - cpu_flags())
    return f"it lacks {', '.join(missing)}" if missing else None


def nothing_runs() -> str:
    """Why none of them runs here, where none does."""
    known = of_machine(here := platform.machine())
    if not known:
        machines = sorted({other.machine for other in INSTRUCTION_SETS.values()})
        return f"there are compiled kernels for {' and '.join(machines)}, and this is {here}"
    return f"this CPU has no {INSTRUCTION_SETS[known[-1]].label}, which every compiled kernel needs"


def _cpuinfo(name: str) -> str:
    """The first line of that name in /proc/cpuinfo; empty if there is none."""
    if not _CPUINFO.exists():
        return ""
    lines = (line.partition(":") for line in _CPUINFO.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
