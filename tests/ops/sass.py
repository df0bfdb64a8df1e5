"""What the kernels of a decode step cost in instructions, from the machine code that Triton makes ahead of time.

    .venv/bin/python -m tests.ops.sass            the table of docs/gpu.md, for sm_90 and the installed Triton
    .venv/bin/python -m tests.ops.sass --json     the same, a line for each kernel

A kernel costs what the loop does in which its tokens pass: instructions of its body times warps, by the tokens of a
tile. Blocks that are jumped over but for one tile in a thousand do not count: rest pages, and bins that are crowded.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.ops.aot import Variant, resources, tool, variants
from tests.ops.aot_shapes import Shape

ARCH = 90

LLAMA = dict(head_size=128, dtype="bfloat16", heads=32, kv_heads=8, alpha_floor=1.0, n_requests=16)

CASES = {
    "model": Shape(ranking="int4", ops=("sparq_decode", "dense_decode"), **LLAMA),
    "int8": Shape(ranking="int8", format="int8", ops=("dense_decode",), **LLAMA),
    "int4": Shape(ranking="int4", format="int4", ops=("dense_decode",), **LLAMA),
    "kivi4": Shape(ranking=None, format="kivi4", ops=("dense_decode",), **LLAMA),
}
"""By page format: the default SparQ decode with r = D / 8, and dense decodes."""


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: ``instructions`` in order, and ``jumps`` (from, to) between them."""

    instructions: list[str]
    jumps: list[tuple[int, int]]

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop, in order of the first; neither of the end of the kernel."""
        return sorted((to, at) for at, to in self.jumps if to < at)

    def size(self, loop: tuple[int, int], marks: str) -> int:
        """Instructions of a loop, but for blocks that a branch may jump over and that hold ``marks`` or a loop."""
        first, last = loop
        skipped: set[int] = set()
        inner = [(a, b) for a, b in self.loops() if first < a and b < last]
        for at, to in self.jumps:
            if first <= at < to <= last:
                block = range(at + 1, to)
                rare = any(a in block and b in block for a, b in inner)
                if rare or any(re.search(marks, self.instructions[i]) for i in block):
                    skipped |= set(block)
        return last - first + 1 - len(skipped)


def disassemble(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1))
    jumps = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_\w+)", instruction)
        if target and labels[target.group(1)] != i:
            jumps.append((i, labels[target.group(1)]))
    return Code(instructions, jumps)


def constant(variant: Variant, name: str) -> Any:
    return variant.constants[(next(i for i, p in enumerate(variant.kernel.params) if p.name == name),)]


def main_loop(code: Code, wanted: str) -> tuple[int, int]:
    """The first of the outermost loops that holds an instruction ``wanted``."""
    found = [(a, b) for a, b in code.loops() if any(re.search(wanted, text) for text in code.instructions[a : b + 1])]
    return min(found, key=lambda loop: (loop[0], -loop[1]))


LOOPS = {
    "score_kernel": (r"\bF2I\b", r"$^"),
    "partition_kernel": (r"\bSHFL\.UP\b", r"\bREDUX\.M"),
    "attend_kernel": (r"\bHG?MMA\b", r"$^"),
}
"""Of each kernel: what its loop over tokens holds, and what marks a block that is hardly ever entered."""


def tokens_of_tile(variant: Variant) -> int:
    if variant.name == "score_kernel":
        return int(constant(variant, "PAGES") * constant(variant, "SLOTS") * constant(variant, "RUNS"))
    return int(constant(variant, "TILE"))


def is_double(ttgir: str, tile: int) -> bool:
    """Whether K and V of a tile, or their codes, arrive in shared memory, and all that does has two buffers."""
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x([\dx]+)x\w+, [^>]*mutable>", ttgir)
    n_large = sum(math.prod(map(int, shape.split("x"))) >= 16 * tile for _, shape in found)
    return n_large >= 2 and all(int(n) >= 2 for n, _ in found)


def rows() -> Iterator[dict[str, Any]]:
    """Per kernel and page format: instructions of a warp per token and KV head, registers, spills, shared memory."""
    for name, shape in CASES.items():
        for variant in variants(ARCH, (shape,)):
            if variant.name not in LOOPS:
                continue
            listed = variant.name == "attend_kernel" and constant(variant, "READ") is not None
            binary = variant.compile(ARCH)
            code = disassemble(binary.asm["cubin"])
            wanted, marks = LOOPS[variant.name]
            size = code.size(main_loop(code, wanted), marks)
            per_token = size * variant.options["num_warps"] / tokens_of_tile(variant)
            yield dict(
                format=name,
                kernel=variant.name + (" of a list" if listed else ""),
                per_token=round(per_token, 2),
                shared=binary.metadata.shared,
                double=variant.name == "attend_kernel" and is_double(binary.asm["ttgir"], tokens_of_tile(variant)),
                **resources(binary.asm["cubin"]),
            )


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| pages | kernel | warp-instructions per token | registers | spilled bytes | shared memory (KiB) | buffers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        buffers = ("two of K and V" if row["double"] else "one") if "attend" in row["kernel"] else "-"
        cells = row["format"], row["kernel"], f"{row['per_token']:.1f}", row["registers"], row["spilled"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['shared'] / 1024:.1f} | {buffers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Instructions of the decode kernels, from their machine code.")
    parser.add_argument("--json", action="store_true", help="a line for each kernel")
    if parser.parse_args().json:
        for row in rows():
            print(json.dumps(row), flush=True)
    else:
        print(table(list(rows())))


if __name__ == "__main__":
    main()
