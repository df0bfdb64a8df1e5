"""How codes are made on a GPU: scales and codes of rows, as `vllm_sparq.ops.codec.quantize` says."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.launch import cast, widen


@triton.jit
def not_below(x, dtype: tl.constexpr):
    """fp32, the smallest number of ``dtype`` that is not below x >= 0; infinity beyond its range."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        nearest = x.to(tl.float16)
        above = (nearest.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.where(nearest.to(tl.float32) < x, above.to(tl.float32), nearest.to(tl.float32))
    else:
        return x


@triton.jit
def scale_of(x, inside, ROWS: tl.constexpr, dtype: tl.constexpr):
    """fp32 (scale, zero) of one group per row: x [rows, elements], of which ``inside`` count."""
    x = widen(x)
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    broken = tl.max((inside & ~(tl.abs(x) < float("inf"))).to(tl.int32), 1) > 0
    if ROWS.numbers == 1:
        largest = tl.abs(tl.maximum(-low, high))
        scale = tl.where(low == high, largest, not_below(tl.div_rn(largest, largest * 0.0 + 127.0), dtype))
    else:
        span = high - low
        CELLS: tl.constexpr = (1 << ROWS.bits) if ROWS.midpoints else (1 << ROWS.bits) - 1
        scale = not_below(tl.div_rn(span, tl.zeros_like(span) + CELLS), dtype)
        if ROWS.midpoints:
            low = widen(cast(low + scale * 0.5, dtype))
    broken = broken | ~(scale < float("inf"))
    zero = low if ROWS.numbers == 2 else tl.zeros_like(low)
    return tl.where(broken, float("nan"), scale), tl.where(broken, float("nan"), zero)


@triton.jit
def put_scales(at, scale, zero, mask, ROWS: tl.constexpr, dtype: tl.constexpr):
    """Store scales [rows] at addresses of bytes."""
    at = at.to(tl.pointer_type(dtype), bitcast=True)
    tl.store(at, cast(scale, dtype), mask=mask)
    if ROWS.numbers == 2:
        tl.store(at + 1, cast(zero, dtype), mask=mask)


@triton.jit
def store_scales(at, x, inside, mask, ROWS: tl.constexpr, dtype: tl.constexpr):
    """The scale of one group per row: x [rows, elements], of which ``inside`` count; ``at`` and ``mask`` [rows]."""
    scale, zero = scale_of(x, inside, ROWS, dtype)
    put_scales(at, scale, zero, mask, ROWS, dtype)


@triton.jit
def encode(x, scale, zero, ROWS: tl.constexpr):
    """int32 codes of fp32 x, the bits of a code set alone; 0 where the scale is zero or NaN."""
    quotient = tl.div_rn(x - zero, tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(x))
    if ROWS.numbers == 1:
        quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
    else:
        quotient = tl.minimum(tl.maximum(quotient, 0.0), (1 << ROWS.bits) - 1.0)
    rounded = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum rounds to a whole number, half to even
    return tl.where(scale > 0.0, rounded, 0.0).to(tl.int32) & ((1 << ROWS.bits) - 1)


@triton.jit
def renew_rows(
    x,  # fp32 [X, E], rows in stored order (`triton_codes`): E is runs * run_pad
    codes,  # int32 [X, E], the codes so far; looked at only in groups that stay
    arrived,  # bool [E], elements that are new: their groups are quantized again
    page,  # pointer to the page's first byte
    row,  # [X]
    live,  # bool [X]
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Ranges and codes of the groups with new elements. Whatever x was made of may be overwritten."""
    RUNS: tl.constexpr = ROWS.runs
    RUN_PAD: tl.constexpr = ROWS.run_pad
    place = tl.arange(0, RUNS * RUN_PAD)
    element = place // RUN_PAD * ROWS.run + place % RUN_PAD
    inside = place % RUN_PAD < ROWS.run
    scale = tl.zeros_like(x)
    zero = tl.zeros_like(x)
    renewed = tl.zeros([RUNS * RUN_PAD], tl.int32)
    tl.debug_barrier()  # other threads have loaded what is overwritten from here on
    for group in range(0, ROWS.width // ROWS.group):
        mine = inside & (element // ROWS.group == group)
        if tl.max((mine & arrived).to(tl.int32), 0) > 0:
            group_step, group_zero = scale_of(x, mine[None, :], ROWS, dtype)
            to = page + ROWS.scales + row * ROWS.scales_step + group * ROWS.scale_bytes
            put_scales(to, group_step, group_zero, live, ROWS, dtype)
            scale = tl.where(mine[None, :], group_step[:, None], scale)
            zero = tl.where(mine[None, :], group_zero[:, None], zero)
            renewed = tl.where(mine, 1, renewed)
    codes = (
        tl.where((renewed > 0)[None, :], encode(x, scale, zero, ROWS), codes) << (place // RUN_PAD * ROWS.bits)[None, :]
    )
    packed = tl.sum(tl.reshape(codes, (x.shape[0], RUNS, RUN_PAD)), 1)
    byte = tl.arange(0, RUN_PAD)
    to = page + ROWS.codes + (row * ROWS.codes_step)[:, None] + byte[None, :]
    tl.store(to, packed.to(tl.uint8), mask=live[:, None] & (byte < ROWS.run)[None, :])
