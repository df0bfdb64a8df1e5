"""How numbers are made of codes on a GPU: two or four to an instruction where the model's type has 16 bits.

The bits of a code, put into the mantissa of a power of two, are that power and the code; the power comes off again, and
the type holds the rest exactly. Compiled code does so in PTX, which Triton's interpreter does not run: it goes through
fp32, as fp32 models do. `tests/ops/test_unpack.py` runs the PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.launch import INTERPRETED, cast, widen


@triton.jit
def as_bytes(records):
    """The same address, of bytes."""
    return records.to(tl.pointer_type(tl.uint8), bitcast=True)


@triton.jit
def load_scales(at, mask, dtype: tl.constexpr, NUMBERS: tl.constexpr):
    """fp32 (scale, zero) at addresses of bytes; both in one load where they fit a word."""
    if NUMBERS == 1:
        scale = widen(tl.load(at.to(tl.pointer_type(dtype), bitcast=True), mask=mask, other=0.0))
        return scale, tl.zeros_like(scale)
    if dtype == tl.float32:
        at = at.to(tl.pointer_type(tl.float32), bitcast=True)
        return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    both = tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)
    if dtype == tl.bfloat16:
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    scale = both.to(tl.int16).to(tl.float16, bitcast=True)
    zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def load_narrow(at, mask, NUMBERS: tl.constexpr):
    """int16 bits of (scale, zero) at addresses of bytes, of a type of 16 bits."""
    if NUMBERS == 1:
        scale = tl.load(at.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        return scale, tl.zeros_like(scale)
    both = tl.load(at.to(tl.pointer_type(tl.int32), bitcast=True), mask=mask, other=0)
    return both.to(tl.int16), (both >> 16).to(tl.int16)


@triton.jit
def dequantize(packed, run: tl.constexpr, scale, zero, BITS: tl.constexpr):
    """fp32 that the codes of one run stand for; ``scale`` and ``zero`` broadcast to ``packed``."""
    if BITS == 8:
        return zero + scale * packed.to(tl.int8, bitcast=True).to(tl.float32)
    # The bits of a code, left where they are, as the low ones of 2^23 as fp32: no shift and no slow conversion.
    TOP: tl.constexpr = ((1 << BITS) - 1) << (BITS * run)
    UNIT: tl.constexpr = 1.0 / (1 << (BITS * run))
    code = ((packed.to(tl.int32) & TOP) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return zero + (scale * UNIT) * code


@triton.jit
def unpack(packed, run: tl.constexpr, scale, zero, ROWS: tl.constexpr, dtype: tl.constexpr):
    """What the codes of one run stand for, as ``dtype``; four codes, or two numbers, to an instruction."""
    scale, _ = tl.broadcast(scale, packed)
    zero, _ = tl.broadcast(zero, packed)
    KIND: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    if ROWS.numbers == 1:
        numbers = signed_numbers(packed, dtype).to(tl.int16, bitcast=True)
    else:
        numbers = small_codes(packed, run * ROWS.bits, (1 << ROWS.bits) - 1, dtype == tl.bfloat16)
    numbers = tl.inline_asm_elementwise(
        f"fma.rn.{KIND} $0, $1, $2, $3;", "=r,r,r,r", [numbers, scale, zero], tl.int16, True, 2
    )
    return numbers.to(dtype, bitcast=True)


@triton.jit
def small_codes(packed, SHIFT: tl.constexpr, MASK: tl.constexpr, BF16: tl.constexpr):
    """Bits of the codes that begin at ``SHIFT``, as numbers of 16 bits: below 128 (fp16: 1024), which comes off again.

    Four bytes become two words of two numbers each.
    """
    CODES: tl.constexpr = 0x01010101 * MASK
    BASE: tl.constexpr = 0x43434343 if BF16 else 0x64646464
    ONE: tl.constexpr = 0x3F803F80 if BF16 else 0x3C003C00
    LESS: tl.constexpr = 0xC300C300 if BF16 else 0xE400E400
    KIND: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .b32 codes, low, high, one, less;
        mov.b32 one, {ONE};
        mov.b32 less, {LESS};
        shr.b32 codes, $2, {SHIFT};
        and.b32 codes, codes, {CODES};
        prmt.b32 low, codes, {BASE}, 0x4140;
        prmt.b32 high, codes, {BASE}, 0x4342;
        fma.rn.{KIND} $0, low, one, less;
        fma.rn.{KIND} $1, high, one, less;
        }}""",
        "=r,=r,r",
        [packed],
        tl.int16,
        True,
        4,
    )


@triton.jit
def signed_numbers(packed, dtype: tl.constexpr):
    """Signed bytes as ``dtype``, which holds them exactly.

    fp16 holds 1024 + 255. bf16 holds 128 + 127: of the lower seven bits comes off 128, or 256 where the highest is set.
    """
    if INTERPRETED or dtype == tl.float32:
        return cast(packed.to(tl.int8, bitcast=True).to(tl.float32), dtype)
    if dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, off, more, minus;
            mov.b32 minus, 0xBF80BF80;
            prmt.b32 low, $2, 0x43434343, 0x4140;
            prmt.b32 high, $2, 0x43434343, 0x4342;
            and.b32 off, low, 0xFF80FF80;
            and.b32 more, high, 0xFF80FF80;
            and.b32 low, low, 0xFF7FFF7F;
            and.b32 high, high, 0xFF7FFF7F;
            fma.rn.bf16x2 $0, off, minus, low;
            fma.rn.bf16x2 $1, more, minus, high;
            }""",
            "=r,=r,r",
            [packed],
            tl.int16,
            True,
            4,
        )
    else:
        numbers = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes, low, high, one, less;
            mov.b32 one, 0x3C003C00;
            mov.b32 less, 0xE480E480;
            xor.b32 codes, $2, 0x80808080;
            prmt.b32 low, codes, 0x64646464, 0x4140;
            prmt.b32 high, codes, 0x64646464, 0x4342;
            fma.rn.f16x2 $0, low, one, less;
            fma.rn.f16x2 $1, high, one, less;
            }""",
            "=r,=r,r",
            [packed],
            tl.int16,
            True,
            4,
        )
    return numbers.to(dtype, bitcast=True)


@triton.jit
def row_units(at, row, live, ROWS: tl.constexpr, dtype: tl.constexpr):
    """fp32 [X], what the numbers of a row count, 0 where masked; 1 where they are what they stand for.

    Signed codes stay whole numbers, but in fp16: softmax weights, which V's unit goes into, have no room there.
    """
    if ROWS.numbers == 1 and dtype != tl.float16:
        unit, _ = load_scales(at + row * ROWS.scales_step + ROWS.scales, live, dtype, 1)
        return unit
    else:
        return tl.full(live.shape, 1.0, tl.float32)
