"""`vllm_sparq.ops.write.write` on a GPU: one launch for pages in the model's type (the others: `triton_quantized`).

Two kinds of programs share the grid and never read what the other writes in this launch:

* a *page* program copies the new tokens of one page and KV head, and makes the scoring copy if that completes the
  page; old tokens come from the page, new ones from ``key``. Moves ``4 D`` elements per new token; a completed page its
  K twice, the second time from L1, and D / 2 bytes per token.
* a *sum* program walks the pages that one request opens, for a slice of the channels: a chain in block order, fed by
  ``value``. In a decode step nearly all of them find nothing to open and leave after one load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import SCORING_BITS, Pages
from vllm_sparq.ops.triton_common import find_request
from vllm_sparq.ops.triton_notes import note_arrivals, note_parts
from vllm_sparq.ops.write.triton_quantized import write_quantized
from vllm_sparq.ops.write.triton_scoring import close_page, scoring_tile

SUM_CHANNELS = 32
"""Channels of one sum program: a 64-byte run of a bf16 row, and enough programs for a long prompt."""


@triton.jit
def sum_values(
    value,  # pointer to this head's row of position 0 (which may lie before the tensor: masked)
    records,  # pointer to this head
    value_sum,
    table,
    first,  # position of the first new token
    context_len,
    value_stride_t,
    page_stride,
    sum_stride_p,
    d,
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    """``value_sum`` of every page that the request opens with its new tokens, for the channels ``d``."""
    opened = tl.cdiv(first, N)
    total = tl.zeros(d.shape, tl.float32)
    for block in tl.range(opened, tl.cdiv(context_len, N)):
        if block > 0:
            before = tl.load(table + block - 1).to(tl.int64)
            if block == opened:
                total = tl.load(value_sum + before * sum_stride_p + d, mask=d < D, other=0.0)
            page_total = tl.zeros([TILE, d.shape[0]], tl.float32)
            for n in range(0, N, TILE):
                slot = n + tl.arange(0, TILE)
                position = (block - 1) * N + slot
                mask = (slot < N)[:, None] & (d < D)[None, :]
                is_old = (position < first)[:, None]
                old = records + before * page_stride + slot[:, None] * (2 * D) + D + d[None, :]
                new = value + position[:, None].to(tl.int64) * value_stride_t + d[None, :]
                page_total += tl.load(old, mask=mask & is_old, other=0.0).to(tl.float32)
                page_total += tl.load(new, mask=mask & (position >= first)[:, None], other=0.0).to(tl.float32)
            total += tl.sum(page_total, 0)
        page = tl.load(table + block).to(tl.int64)
        tl.store(value_sum + page * sum_stride_p + d, total, mask=d < D)


@triton.jit(do_not_specialize=["n_requests", "n_page_programs"])
def write_kernel(
    key,  # [T, G, D]
    value,
    records,  # keys of the pages [P, G, N, D]; V lies D elements behind
    scoring,  # [P, G, D, N / 2 | N]
    ranges,  # fp16 [P, G, D, 2]
    value_sum,  # fp32 [P, G, D]
    positions,  # int32 [P, G, N]
    scores,  # fp32 [P, G, N]
    block_table,  # int32 [B, M]
    query_start_loc,
    seq_lens,
    first_positions,  # int32 [B] with SHIFTED
    key_stride_t,
    key_stride_g,
    value_stride_t,
    value_stride_g,
    page_stride,  # of records, in elements; the next lines alike for the other parts
    head_stride,
    scoring_stride_p,
    scoring_stride_g,
    ranges_stride_p,
    ranges_stride_g,
    sum_stride_p,
    sum_stride_g,
    notes_stride_p,  # of positions and of scores
    notes_stride_g,
    table_stride,
    n_requests,
    n_page_programs,
    SCORING: tl.constexpr,
    HAS_SUM: tl.constexpr,
    POSITIONS: tl.constexpr,
    SCORES: tl.constexpr,
    SHIFTED: tl.constexpr,  # whether positions differ from slots
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    B_PAD: tl.constexpr,
    COPY_TILE: tl.constexpr,
    TILE: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
):
    """Grid (page programs, then sum programs; G)."""
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    key += g * key_stride_g
    value += g * value_stride_g
    records += g * head_stride
    if pid >= n_page_programs:
        if HAS_SUM:
            SLICES: tl.constexpr = (D + SUM_CHANNELS - 1) // SUM_CHANNELS
            b = (pid - n_page_programs) // SLICES
            start = tl.load(query_start_loc + b)
            n_new = tl.load(query_start_loc + b + 1) - start
            if n_new > 0:
                context_len = tl.load(seq_lens + b)
                first = context_len - n_new
                d = (pid - n_page_programs) % SLICES * SUM_CHANNELS + tl.arange(0, SUM_CHANNELS)
                value += (start - first).to(tl.int64) * value_stride_t
                value_sum += g * sum_stride_g
                table = block_table + b.to(tl.int64) * table_stride
                sum_values(
                    *(value, records, value_sum, table, first, context_len, value_stride_t, page_stride, sum_stride_p),
                    *(d, N, D, TILE),
                )
        return

    b, tile = find_request(query_start_loc, n_requests, pid, N, 2, B_PAD)
    if b < 0:
        return
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    context_len = tl.load(seq_lens + b)
    first = context_len - n_new
    block = first // N + tile
    if (n_new <= 0) | (first < 0) | (block * N >= context_len):  # first < 0: a padding row of a decode batch
        return
    page = tl.load(block_table + b.to(tl.int64) * table_stride + block).to(tl.int64)
    records += page * page_stride
    n_old = tl.maximum(first - block * N, 0)
    stop = tl.minimum(context_len - block * N, N)
    row = (start - first + block * N).to(tl.int64)  # of slot 0; before the tensor where that slot is old
    key += row * key_stride_t
    value += row * value_stride_t
    d = tl.arange(0, D_PAD)[None, :]
    for n in range(n_old, stop, COPY_TILE):
        slot = (n + tl.arange(0, COPY_TILE))[:, None]
        mask = (slot < stop) & (d < D)
        k = tl.load(key + slot.to(tl.int64) * key_stride_t + d, mask=mask)
        v = tl.load(value + slot.to(tl.int64) * value_stride_t + d, mask=mask)
        tl.store(records + slot * (2 * D) + d, k, mask=mask)
        tl.store(records + slot * (2 * D) + D + d, v, mask=mask)
    if POSITIONS:
        at = page * notes_stride_p + g * notes_stride_g
        slot_0 = block * N
        if SHIFTED:
            slot_0 += tl.load(first_positions + b) - first
        note_arrivals(positions + at, scores + at, slot_0, n_old, stop, SCORES)
    if SCORING is not None:  # noqa: SIM102  known at compile time, the rest is not
        if stop == N:
            scoring += page * scoring_stride_p + g * scoring_stride_g
            ranges += page * ranges_stride_p + g * ranges_stride_g
            close_page(
                *(key, records, block_table, scoring, ranges, n_old, key_stride_t, page_stride),
                *(SCORING, N, D, D_PAD, TILE, 0, None),
            )


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> None:
    layout, n_requests = pages.layout, query_start_loc.shape[0] - 1
    (n_tokens, n_kv_heads, head_size), block_size = key.shape, layout.block_size
    if n_requests == 0 or n_tokens == 0:
        return
    if layout.quantized is not None:
        write_quantized(key, value, pages, block_table, query_start_loc, seq_lens, first_positions)
        return
    # A part that the layout lacks is never touched: any pointer does.
    scoring = pages.scoring if layout.scoring else pages.data
    ranges = pages.ranges if layout.scoring in SCORING_BITS else pages.data
    value_sum = pages.value_sum if layout.value_sum else pages.data
    n_page_programs = n_tokens // block_size + 2 * n_requests
    n_sum_programs = n_requests * -(-head_size // SUM_CHANNELS) if layout.value_sum else 0
    d_pad = triton.next_power_of_2(head_size)
    strides = [t.stride(i) for t in (key, value, pages.keys, scoring, ranges, value_sum) for i in (0, 1)]
    positions, scores, *notes_strides = note_parts(pages)
    shifted = layout.positions and first_positions is not None
    write_kernel[(n_page_programs + n_sum_programs, n_kv_heads)](
        *(key, value, pages.keys, scoring, ranges, value_sum, positions, scores),
        *(block_table, query_start_loc, seq_lens, first_positions if shifted else seq_lens),
        *(*strides, *notes_strides, block_table.stride(0), n_requests, n_page_programs),
        SCORING=layout.scoring,
        HAS_SUM=layout.value_sum,
        POSITIONS=layout.positions,
        SCORES=layout.scores,
        SHIFTED=shifted,
        N=block_size,
        D=head_size,
        D_PAD=d_pad,
        B_PAD=triton.next_power_of_2(n_requests),
        COPY_TILE=16,
        TILE=scoring_tile(block_size, d_pad),
        SUM_CHANNELS=SUM_CHANNELS,
        num_warps=4,
    )
