"""Compiles Triton kernels ahead of time, without a GPU: what the ops launch for the shapes of `tests.ops.aot_shapes`.

A script, since it needs a process of its own: the process of the tests interprets kernels, and which Triton is used is
a matter of the path. It calls the ops on CPU tensors with the launch replaced by a note of its arguments, so what is
compiled is what would have been launched: the wrapper's tile shapes, types and alignments.

    python -m tests.ops.aot 90            a JSON line for one variant of each kernel
    python -m tests.ops.aot 90 --all      for every variant
    python -m tests.ops.aot 90 --start    for all that an engine launches at start, as far as Triton's own checks
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget

from tests.ops.aot_shapes import SHAPES, STARTS, Shape, launch_all, launch_start

SM_COUNT = {80: 108, 90: 132}
"""Multiprocessors by compute capability (A100, H100): launch sizes follow from them."""

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
"""Of a launch, what the compiler is told."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel as it is launched for ``shape``, once for each set of compile-time arguments."""

    kernel: Any
    shape: Shape
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def key(self) -> tuple[str, ...]:
        return self.name, *map(str, self.signature.items()), *map(str, self.constants.items()), *map(str, self.options)

    def compile(self, arch: int) -> Any:
        source = triton.compiler.ASTSource(
            fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.attributes
        )
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)

    def check(self, arch: int) -> None:
        """What Triton checks before it optimizes: types and shapes of everything. Hundredths of a second."""
        source = triton.compiler.ASTSource(
            fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.attributes
        )
        target = GPUTarget("cuda", arch, 32)
        backend = triton.compiler.make_backend(target)
        options = backend.parse_options(self.options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        given = backend.get_codegen_implementation(options), backend.get_module_map()
        source.make_ir(target, options, *given, context)


def variants(arch: int, shapes: Iterable[Shape], launch: Callable[[Shape], None] = launch_all) -> Iterator[Variant]:
    """Every distinct variant that ``shapes`` launch, on a GPU of so many multiprocessors."""
    from vllm_sparq.ops.triton_common import launch as triton_common

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, grid, warmup, **named: launches.append(
        (kernel, args, named)
    )
    triton_common.INTERPRETED_SMS = SM_COUNT[arch]
    seen = set()
    for shape in shapes:
        launches.clear()
        launch(shape)
        for kernel, args, named in launches:
            signature, constants, attributes = specialise(kernel, args, named)
            variant = Variant(
                kernel=kernel,
                shape=shape,
                signature=signature,
                constants=constants,
                attributes=attributes,
                options={name: named[name] for name in OPTIONS if name in named},
            )
            if variant.key not in seen:
                seen.add(variant.key)
                yield variant


def specialise(
    kernel: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """(signature, constants, attributes) as the launcher makes them: ones are constants, multiples of 16 are marked."""
    given = dict(zip([p.name for p in kernel.params], args, strict=False)) | named
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (value == 1 if type(value) is int and not parameter.do_not_specialize else False):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def few(found: Iterator[Variant]) -> Iterator[Variant]:
    """Of each kernel the first variant for quantized pages, which needs the most; the first of all where none is."""
    of_kernel: dict[str, Variant] = {}
    coded = set()
    for variant in found:
        place = next((i for i, p in enumerate(variant.kernel.params) if p.name == "FORMAT"), None)
        takes_codes = place is not None and variant.constants[(place,)] is not None
        if variant.name not in of_kernel or (takes_codes and variant.name not in coded):
            of_kernel[variant.name] = variant
        if takes_codes:
            coded.add(variant.name)
    yield from of_kernel.values()


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton carries."""
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory, as the assembler reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return dict(registers=int(found["REG"]), spilled=int(found["STACK"]) + int(found["LOCAL"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time; a JSON line for each.")
    parser.add_argument("arch", type=int, choices=SM_COUNT, help="compute capability")
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--start", action="store_true", help="check what engines launch at start, and compile nothing")
    arguments = parser.parse_args()
    if arguments.start:
        for variant in variants(arguments.arch, SHAPES if arguments.all else STARTS, launch_start):
            variant.check(arguments.arch)
            print(json.dumps({"kernel": variant.name, "shape": repr(variant.shape)}), flush=True)
        return
    found = variants(arguments.arch, SHAPES)
    for variant in found if arguments.all else few(found):
        binary = variant.compile(arguments.arch)
        usage = resources(binary.asm["cubin"])
        row = dict(kernel=variant.name, shape=repr(variant.shape), shared=binary.metadata.shared, **usage)
        print(json.dumps(row | {"triton": triton.__version__}), flush=True)


if __name__ == "__main__":
    main()
