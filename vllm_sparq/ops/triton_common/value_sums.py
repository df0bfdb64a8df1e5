"""Sums of V over all tokens before a block: a chain in block order, over V as the pages store it."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.codes import gather
from vllm_sparq.ops.triton_common.unpack import as_bytes

SUM_CHANNELS = 32
"""Channels of one program: a 64-byte run of a bf16 row, and enough programs for a long prompt."""

SUM_TILE = 64
"""Tokens that are added at a time."""


@triton.jit
def chain_sums(
    records,  # pages of one KV head, of the model's type
    value_sum,  # of this head
    table,
    d,  # channels
    start,
    opened,
    stop,
    page_stride,  # of records, in elements
    sum_stride_p,
    FORMAT: tl.constexpr,  # None where V is stored in the model's type
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """``value_sum`` of the blocks ``opened : stop``, added up from the one of block ``start - 1``, which is right."""
    total = tl.zeros(d.shape, tl.float32)
    for block in tl.range(start, stop):
        if block > 0:
            before = tl.load(table + block - 1).to(tl.int64)
            if block == start:
                total = tl.load(value_sum + before * sum_stride_p + d, mask=d < D, other=0.0)
            page_total = tl.zeros([TILE, d.shape[0]], tl.float32)
            for n in range(0, N, TILE):
                slot = (n + tl.arange(0, TILE))[:, None]
                mask = (slot < N) & (d < D)[None, :]
                if FORMAT is None:
                    at = records + before * page_stride + slot * (2 * D) + D + d[None, :]
                    page_total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
                else:
                    at = as_bytes(records + before * page_stride)
                    dtype: tl.constexpr = records.dtype.element_ty
                    VALUES: tl.constexpr = FORMAT.values
                    page_total += gather(at, slot, d[None, :], mask, VALUES, dtype)
            total += tl.sum(page_total, 0)
        if block >= opened:
            page = tl.load(table + block).to(tl.int64)
            tl.store(value_sum + page * sum_stride_p + d, total, mask=d < D)
