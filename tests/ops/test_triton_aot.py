"""Every Triton kernel compiles for A100 and H100, without a GPU, and fits their shared memory.

This file is a test and a script. The script runs in a process of its own, because the tests' process interprets
kernels. It calls the ops on CPU tensors with the launch replaced by a note of its arguments, so what is compiled is
what would have been launched: the wrapper's tile shapes, types and alignments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What one program may use, by compute capability."""

SM_COUNT = {80: 108, 90: 132}

MAX_SPILL_BYTES = 128
"""Of local memory per thread. A few spilled registers cost nothing; a kernel that keeps its tile there is unusable."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    head_size: int
    dtype: str
    ranking: str | None
    format: str = "model"
    heads: int = 8
    kv_heads: int = 2
    block_size: int = 128
    alpha_floor: float = 0.5
    group_reduce: str = "logits"
    mass: float | None = None
    n_requests: int = 2
    new_tokens: int = 4096
    tracked: bool = False  # positions and scores
    ops: tuple[str, ...] = ("write", "dense_decode", "sparq_decode", "prefill")


ALL = ("write", "dense_decode", "sparq_decode", "prefill", "evict")
DENSE = ("dense_decode", "prefill", "evict")
SPANS = ("write", "quest_decode")
SHAPES = (
    Shape(head_size=128, dtype="bfloat16", ranking="int4"),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", heads=2, alpha_floor=0.0, ops=("sparq_decode",)),
    Shape(
        head_size=64,
        dtype="bfloat16",
        ranking="int8",
        heads=16,
        group_reduce="probs",
        block_size=64,
        n_requests=512,
        ops=("write", "sparq_decode"),
    ),
    Shape(head_size=80, dtype="float32", ranking="int4", alpha_floor=1.0),
    Shape(head_size=256, dtype="bfloat16", ranking="model", heads=4, block_size=32, new_tokens=2),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", format="int4"),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="kivi2"),
    Shape(
        head_size=64,
        dtype="float16",
        ranking="int8",
        format="int8",
        heads=16,
        alpha_floor=1.0,
        block_size=64,
        ops=("write", "dense_decode"),
    ),
    Shape(
        head_size=80,
        dtype="float32",
        ranking=None,
        format="kivi4",
        block_size=48,
        alpha_floor=1.0,
        ops=("sparq_decode", "prefill"),
    ),
    Shape(
        head_size=256,
        dtype="bfloat16",
        ranking=None,
        format="kivi2",
        heads=4,
        block_size=32,
        new_tokens=2,
        ops=("write", "dense_decode"),
    ),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", mass=0.9, ops=("sparq_decode",)),
    Shape(
        head_size=128,
        dtype="bfloat16",
        ranking=None,
        format="kivi4",
        heads=16,
        group_reduce="probs",
        mass=0.9,
        tracked=True,
        ops=("sparq_decode",),
    ),
    Shape(head_size=128, dtype="bfloat16", ranking="int4", tracked=True, ops=ALL),
    Shape(
        head_size=64,
        dtype="float16",
        ranking="int8",
        heads=16,
        group_reduce="probs",
        block_size=64,
        n_requests=512,
        tracked=True,
        ops=("sparq_decode",),
    ),
    Shape(head_size=80, dtype="float32", ranking="int4", format="int4", block_size=48, tracked=True, ops=("evict",)),
    Shape(head_size=128, dtype="bfloat16", ranking=None, format="kivi2", tracked=True, ops=("write", *DENSE)),
    Shape(head_size=256, dtype="float16", ranking=None, format="kivi4", block_size=256, tracked=True, ops=("evict",)),
    Shape(head_size=128, dtype="bfloat16", ranking="bounds", heads=32, kv_heads=8, alpha_floor=1.0, ops=SPANS),
    Shape(
        head_size=80,
        dtype="float32",
        ranking="bounds",
        format="kivi4",
        block_size=48,
        n_requests=512,
        alpha_floor=1.0,
        ops=SPANS,
    ),
)


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict[str, object]]]:
    """By compute capability, a row per kernel and shape."""
    pytest.importorskip("triton", reason="triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    env["CUDA_VISIBLE_DEVICES"] = ""
    jobs = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for arch in SHARED_BYTES
    }
    rows = {}
    try:
        for arch, job in jobs.items():
            out, err = job.communicate(timeout=570)
            assert job.returncode == 0, f"sm_{arch}: {err[-3000:]}"
            rows[arch] = [json.loads(line) for line in out.splitlines()]
    finally:
        for job in jobs.values():
            job.kill()
    return rows


KERNELS = {
    "choose_kernel",
    "move_kernel",
    "sum_kernel",
    "attention_kernel",
    "note_prefill_kernel",
    "write_kernel",
    "encode_kernel",
    "open_sums_kernel",
    "attend_kernel",
    "merge_kernel",
    "score_kernel",
    "rank_kernel",
    "count_kernel",
    "partition_kernel",
    "finish_kernel",
    "cut_kernel",
    "blend_kernel",
    "prefill_kernel",
}


@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_every_kernel_compiles_and_fits(compiled: dict[int, list[dict[str, object]]], arch: int) -> None:
    rows = compiled[arch]
    assert {row["kernel"] for row in rows} == KERNELS
    too_much = [row for row in rows if int(str(row["shared"])) > SHARED_BYTES[arch]]
    assert not too_much, "more shared memory than there is"
    spilled = [row for row in rows if int(str(row["spilled"])) > MAX_SPILL_BYTES]
    assert not spilled, "local memory per thread"


def main(arch: int) -> None:
    """Print a JSON line for every distinct kernel that `SHAPES` launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    launches: list[tuple[Shape, object, tuple, dict]] = []
    shape = SHAPES[0]
    triton.runtime.jit.JITFunction.run = lambda kernel, *args, grid, warmup, **options: launches.append(
        (shape, kernel, args, options)
    )
    from vllm_sparq.ops.triton_common import launch as triton_common

    triton_common.INTERPRETED_SMS = SM_COUNT[arch]
    for shape in SHAPES:
        launch_all(shape)
    seen = set()
    for shape, kernel, args, options in launches:
        signature, constants, attributes = specialise(kernel, args, options)
        key = (kernel.__name__, *signature.items(), *map(str, constants.items()))
        if key in seen:
            continue
        seen.add(key)
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        knobs = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=knobs)
        usage = resources(binary.asm["cubin"])
        print(json.dumps(dict(kernel=kernel.__name__, shape=repr(shape), shared=binary.metadata.shared, **usage)))


def launch_all(shape: Shape) -> None:
    """Call every op once on tensors of this shape."""
    import torch

    from vllm_sparq.layout import PageLayout, Pages
    from vllm_sparq.ops.dense_decode.triton import dense_decode
    from vllm_sparq.ops.evict.triton import evict
    from vllm_sparq.ops.prefill.triton import prefill
    from vllm_sparq.ops.quest_decode.triton import quest_decode
    from vllm_sparq.ops.sparq_decode.triton import sparq_decode
    from vllm_sparq.ops.write.triton import write
    from vllm_sparq.reads import SpansRead, SparqRead

    dtype, d, b = getattr(torch, shape.dtype), shape.head_size, shape.n_requests
    layout = PageLayout(
        head_size=d,
        block_size=shape.block_size,
        dtype=dtype,
        ranking=shape.ranking,
        value_sum=shape.alpha_floor < 1,
        format=shape.format,
        positions=shape.tracked,
        attention=shape.tracked,
    )
    pages = Pages.empty(1, shape.kv_heads, layout)
    query = torch.empty(shape.new_tokens, shape.heads, d, dtype=dtype)
    key = torch.empty(shape.new_tokens, shape.kv_heads, d, dtype=dtype)
    table = torch.empty(b, 4096 // shape.block_size, dtype=torch.int32)
    starts, lens = torch.empty(b + 1, dtype=torch.int32), torch.empty(b, dtype=torch.int32)
    read = SparqRead(
        r=max(1, d // 8),
        min_k=128,
        k_per_token=Fraction(1, 16),
        alpha_floor=shape.alpha_floor,
        group_reduce=shape.group_reduce,
        mass=shape.mass,
        least_k=64,
        dense_below=1024,
    )
    spans = SpansRead(min_k=128, k_per_token=Fraction(1, 16), dense_below=1024)
    one = query[:b]
    calls = {
        "write": lambda: write(key, key, pages, table, starts, lens, lens if shape.tracked else None),
        "prefill": lambda: prefill(query, key, key, pages, table, starts, lens, scale=1.0, out=query),
        "dense_decode": lambda: dense_decode(one, pages, table, lens, scale=1.0, out=one),
        "sparq_decode": lambda: sparq_decode(one, pages, table, lens, read=read, scale=1.0, out=one),
        "quest_decode": lambda: quest_decode(one, pages, table, lens, read=spans, scale=1.0, out=one),
        "evict": lambda: evict(
            pages, table, lens, lens, lens, sinks=4, rank="attention" if pages.layout.attention else "age"
        ),
    }
    for op in shape.ops:
        calls[op]()


def specialise(kernel, args: tuple, options: dict) -> tuple[dict, dict, dict]:  # type: ignore[no-untyped-def]
    """(signature, constants, attributes) as the launcher makes them: ones are constants, multiples of 16 are marked."""
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    names[torch.uint8] = "u8"
    given = dict(zip([p.name for p in kernel.params], args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or (value == 1 if type(value) is int and not parameter.do_not_specialize else False):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory, as the assembler reports them."""
    import re
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return dict(registers=int(found["REG"]), spilled=int(found["STACK"]) + int(found["LOCAL"]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
