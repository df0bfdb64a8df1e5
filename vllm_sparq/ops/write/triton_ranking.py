"""What ranks the tokens or spans of a full block: a channel-major copy of K, or bounds; part of `write` on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.codes import gather
from vllm_sparq.ops.triton_common.launch import cast, widen
from vllm_sparq.reads import SPAN_TOKENS

SPAN = tl.constexpr(SPAN_TOKENS)


@triton.jit
def fp16_not_above(x):
    """The largest finite fp16 that is not above each fp32 element; the smallest finite one where there is none."""
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = bits & 0x7FFF
    below = tl.where(magnitude == 0, 0x8001, tl.where(bits < 0, 0x8000 | (magnitude + 1), magnitude - 1))
    bits = tl.where(nearest.to(tl.float32) > x, below, bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def encode(x, zero, scale, TOP: tl.constexpr):
    """uint8 codes of x [tokens, D] with fp32 ``zero`` and ``scale`` [D]."""
    quotient = tl.div_rn(x - zero[None, :], tl.where(scale > 0.0, scale, 1.0)[None, :] + tl.zeros_like(x))
    quotient = tl.minimum(tl.maximum(quotient, 0.0), TOP)
    rounded = (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum rounds to a whole number, half to even
    return tl.where(scale[None, :] > 0.0, rounded, 0.0).to(tl.int32).to(tl.uint8)


@triton.jit
def load_block(
    new,  # pointer to the row of slot 0 and this head (which may lie before the tensor: masked)
    old,  # pointer to the page's first record; STAGED: to the first of this head
    ahead,  # STAGED: pointer to the block table's entry after the block
    slot,
    d,
    mask,
    n_old,
    new_stride_t,
    page_stride,
    D: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Channels ``d`` of a block's tokens ``slot``, shapes that broadcast: those below ``n_old`` from their records, in
    the page or (STAGED places a page) where they wait, the others from ``new``."""
    if STAGED == 0:
        old = old + slot * (2 * D)
    else:
        page = tl.load(ahead + slot // STAGED, mask=slot < n_old, other=0).to(tl.int64)
        old = old + page * page_stride + slot % STAGED * (2 * D)
    was = tl.load(old + d, mask=mask & (slot < n_old), other=0.0)
    brought = tl.load(new + slot.to(tl.int64) * new_stride_t + d, mask=mask & (slot >= n_old), other=0.0)
    return tl.where(slot < n_old, was, brought)


@triton.jit
def page_keys(
    key,
    records,
    ahead,
    slot,
    n_old,
    key_stride_t,
    page_stride,
    mask,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STAGED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """K [slots, D] of one block, as in `load_block`, or with FORMAT from codes: of the page at ``records``, bytes."""
    d = tl.arange(0, D_PAD)[None, :]
    slot, mask = slot[:, None], mask[:, None] & (d < D)
    if FORMAT is None:
        return load_block(key, records, ahead, slot, d, mask, n_old, key_stride_t, page_stride, D, STAGED)
    else:
        KEYS: tl.constexpr = FORMAT.keys
        dtype: tl.constexpr = key.dtype.element_ty
        if FORMAT.channel_keys:
            return cast(gather(records, d, slot, mask, KEYS, dtype), dtype)
        else:
            return cast(gather(records, slot, d, mask, KEYS, dtype), dtype)


@triton.jit
def finite(x):
    """fp32, 0 where x is not finite."""
    x = widen(x)
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def extremes(keys):
    """fp32 (least, largest) element of each channel of keys [tokens, D]; those that are not finite count as 0."""
    x = finite(keys)
    return tl.min(x, 0), tl.max(x, 0)


@triton.jit
def close_page(
    key,  # this and the next two as in `page_keys`
    records,
    ahead,
    ranking,  # pointers to this page and head
    scales,
    n_old,
    key_stride_t,
    page_stride,
    RANKING: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    STAGED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The channel-major copy of a page's K, or the bounds of its spans."""
    if RANKING == "bounds":
        d = tl.arange(0, D_PAD)
        dtype: tl.constexpr = ranking.dtype.element_ty
        for first in range(0, N, SPAN):
            slot = first + tl.arange(0, SPAN)
            low, high = extremes(
                page_keys(
                    key, records, ahead, slot, n_old, key_stride_t, page_stride, slot < N, D, D_PAD, STAGED, FORMAT
                )
            )
            to = ranking + first // SPAN * (2 * D) + d
            tl.store(to, cast(low, dtype), mask=d < D)
            tl.store(to + D, cast(high, dtype), mask=d < D)
    else:
        copy_keys(
            *(key, records, ahead, ranking, scales, n_old, key_stride_t, page_stride),
            *(RANKING, N, D, D_PAD, TILE, STAGED, FORMAT),
        )


@triton.jit
def copy_keys(
    key,  # this and the next two as in `page_keys`
    records,
    ahead,
    ranking,  # pointers to this page and head
    scales,
    n_old,
    key_stride_t,
    page_stride,
    RANKING: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    STAGED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The channel-major copy of a page's K. Slots n and n + N/2 go together: int4 packs them in one byte."""
    d = tl.arange(0, D_PAD)
    HALF: tl.constexpr = N // 2
    WIDTH: tl.constexpr = HALF if RANKING == "int4" else N
    TOP: tl.constexpr = 15.0 if RANKING == "int4" else 255.0
    zero = tl.zeros([D_PAD], tl.float32)
    scale = tl.zeros([D_PAD], tl.float32)
    if RANKING != "model":
        least = tl.full([TILE, D_PAD], float("inf"), tl.float32)
        most = tl.full([TILE, D_PAD], float("-inf"), tl.float32)
        for first in range(0, N, TILE):
            slot = first + tl.arange(0, TILE)
            x = finite(
                page_keys(
                    key, records, ahead, slot, n_old, key_stride_t, page_stride, slot < N, D, D_PAD, STAGED, FORMAT
                )
            )
            least = tl.where((slot < N)[:, None], tl.minimum(least, x), least)
            most = tl.where((slot < N)[:, None], tl.maximum(most, x), most)
        low = fp16_not_above(tl.min(least, 0))
        zero = low.to(tl.float32)
        span = tl.div_rn(tl.max(most, 0) - zero, zero * 0.0 + TOP)
        high = -fp16_not_above(-span)
        scale = high.to(tl.float32)
        tl.store(scales + d * 2, high, mask=d < D)
        tl.store(scales + d * 2 + 1, low, mask=d < D)
    for first in range(0, HALF, TILE):
        slot = first + tl.arange(0, TILE)
        inside = slot < HALF
        to = ranking + d[None, :] * WIDTH + slot[:, None]
        mask = inside[:, None] & (d < D)[None, :]
        early = page_keys(key, records, ahead, slot, n_old, key_stride_t, page_stride, inside, D, D_PAD, STAGED, FORMAT)
        late = page_keys(
            key, records, ahead, slot + HALF, n_old, key_stride_t, page_stride, inside, D, D_PAD, STAGED, FORMAT
        )
        if RANKING == "model":
            tl.store(to, early, mask=mask)
            tl.store(to + HALF, late, mask=mask)
        else:
            early = encode(finite(early), zero, scale, TOP)
            late = encode(finite(late), zero, scale, TOP)
            if RANKING == "int4":
                tl.store(to, early | (late << 4), mask=mask)
            else:
                tl.store(to, early, mask=mask)
                tl.store(to + HALF, late, mask=mask)


def ranking_tile(block_size: int, d_pad: int) -> int:
    """Tokens of one step of `copy_keys`."""
    return int(min(triton.next_power_of_2(block_size // 2), max(16, 4096 // d_pad)))
