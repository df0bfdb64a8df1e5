"""The few instructions of PTX that our kernels hold as text, run on the CPU."""

from __future__ import annotations

import re
from typing import Any

import torch

WORD = 0xFFFFFFFF


def run(asm: str, inputs: list[int]) -> list[int]:
    """Registers ``$0``, ``$1``, .. that ``asm`` writes, of inputs that follow them."""
    n_outputs = len(set(re.findall(r"^\s*[\w.]+ (\$\d+),", asm, re.M)) | set(re.findall(r"; *[\w.]+ (\$\d+),", asm)))
    registers = {f"${n_outputs + i}": value for i, value in enumerate(inputs)}
    for line in asm.strip(" {}\n").split(";"):
        parts = line.split(None, 1)
        if not parts or parts[0] == ".reg":
            continue
        name, (to, *given) = parts[0], [operand.strip() for operand in parts[1].split(",")]
        values = [registers[x] if x in registers else int(x, 0) for x in given]
        registers[to] = STEPS[name](*values) & WORD
    return [registers[f"${i}"] for i in range(n_outputs)]


def _prmt(a: int, b: int, selector: int) -> int:
    pool = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(pool[selector >> 4 * i & 7] for i in range(4)), "little")


def numbers(word: int, dtype: torch.dtype) -> torch.Tensor:
    """The two numbers of 16 bits in a word, as fp64."""
    return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(dtype).double()


def word(two: torch.Tensor, dtype: torch.dtype) -> int:
    low, high = two.to(dtype).view(torch.uint16).tolist()
    return int(low | high << 16)


def _fma(dtype: torch.dtype) -> Any:
    return lambda a, b, c: word(numbers(a, dtype) * numbers(b, dtype) + numbers(c, dtype), dtype)


STEPS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << min(n, 32),  # a shift is unsigned, and no wider than the word
    "shr.b32": lambda a, n: a >> min(n, 32),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma(torch.bfloat16),
    "fma.rn.f16x2": _fma(torch.float16),
    "mul.rn.f16x2": lambda a, b: word(numbers(a, torch.float16) * numbers(b, torch.float16), torch.float16),
}
