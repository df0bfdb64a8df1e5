"""`vllm_sparq.ops.write.write` on a GPU into quantized pages: three launches, or two without value sums.

1. The block that each request had begun before, if it fills now: its codes are made, from the staged tokens and the new
   ones. Only then may anything be written after it, where its tokens are staged.
2. Every other full block is encoded from ``key`` and ``value`` alone; the newest block of each request is staged.
3. The pages that a request opens get their sum of V (`triton_sums`), of what is stored: codes.

K and V have programs of their own. Each encodes in two passes over its block, the second from L1: scales of all groups,
then codes. Moves ``4 D`` elements per staged token, and per encoded block K and V once and their codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.triton_common.attention_scores import track_arrivals, tracked_parts
from vllm_sparq.ops.triton_common.codes import Rows, as_bytes, codes_of, load_scales
from vllm_sparq.ops.triton_common.encode import encode, store_scales
from vllm_sparq.ops.triton_common.launch import find_request, step_kernel, widen
from vllm_sparq.ops.write.triton_ranking import close_page, load_block, ranking_tile
from vllm_sparq.ops.write.triton_sums import write_sums


@triton.jit
def load_elements(source, row, element, mask, n_old, D: tl.constexpr, STAGED: tl.constexpr, CHANNELS: tl.constexpr):
    """[rows, elements] of a block's K or V, where rows are its tokens or its channels."""
    new, old, ahead, new_stride_t, page_stride = source
    if CHANNELS:
        return load_block(
            new, old, ahead, element[None, :], row[:, None], mask, n_old, new_stride_t, page_stride, D, STAGED
        )
    else:
        return load_block(
            new, old, ahead, row[:, None], element[None, :], mask, n_old, new_stride_t, page_stride, D, STAGED
        )


@triton.jit
def encode_block(
    source,  # (new, old, ahead, new_stride_t, page_stride) of `load_block`
    page,  # pointer to the page's first byte
    n_old,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,  # rows
    CHANNELS: tl.constexpr,  # whether a row is a channel
    TILE: tl.constexpr,
    D: tl.constexpr,
    STAGED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Ranges and codes of all rows of K or V of a full block."""
    for first in range(0, COUNT, TILE):
        row = first + tl.arange(0, TILE)
        for group in range(0, ROWS.width // ROWS.group):
            index = tl.arange(0, ROWS.group_pad)
            inside = (row < COUNT)[:, None] & (index < ROWS.group)[None, :]
            x = load_elements(source, row, group * ROWS.group + index, inside, n_old, D, STAGED, CHANNELS)
            to = page + ROWS.scales + row * ROWS.scales_step + group * ROWS.scale_bytes
            store_scales(to, x, inside, row < COUNT, ROWS, dtype)
    tl.debug_barrier()  # scales are read by other threads than wrote them
    CHUNK: tl.constexpr = ROWS.row_chunk
    RUNS: tl.constexpr = ROWS.runs
    for first in range(0, COUNT, TILE):
        row = first + tl.arange(0, TILE)
        for start in range(0, ROWS.run, CHUNK):
            byte = start + tl.arange(0, CHUNK)
            inside = (row < COUNT)[:, None] & (byte < ROWS.run)[None, :]
            packed = tl.zeros([TILE, CHUNK], tl.int32)
            for r in tl.static_range(RUNS):
                x = load_elements(source, row, r * ROWS.run + byte, inside, n_old, D, STAGED, CHANNELS)
                group = (r * ROWS.run + start) // ROWS.group
                scales_at = page + ROWS.scales + row * ROWS.scales_step + group * ROWS.scale_bytes
                scale, zero = load_scales(scales_at, row < COUNT, dtype, ROWS.numbers)
                packed |= encode(widen(x), scale[:, None], zero[:, None], ROWS) << (r * ROWS.bits)
            to = page + ROWS.codes + (row * ROWS.codes_step)[:, None] + byte[None, :]
            tl.store(to, packed.to(tl.uint8), mask=inside)


@triton.jit
def write_side(
    new,  # K or V: pointer to the row of slot 0 and this head, which may lie before the tensor
    staged,  # pointer to where this head's first record would keep it
    page,  # pointer to the block's page, its first byte
    ahead,  # pointer to the block table's entry after the block
    n_old,
    stop,
    is_staged,
    is_encoded,
    new_stride_t,
    page_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    COPY_TILE: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Stage the slots ``n_old : stop`` of a block, encode all of them, or both."""
    d = tl.arange(0, D_PAD)[None, :]
    for n in range(n_old, stop if is_staged else n_old, COPY_TILE):
        slot = n + tl.arange(0, COPY_TILE)
        ahead_page = tl.load(ahead + slot // STAGED, mask=slot < stop, other=0).to(tl.int64)
        to = (staged + ahead_page * page_stride + slot % STAGED * (2 * D))[:, None] + d
        mask = (slot < stop)[:, None] & (d < D)
        x = tl.load(new + (slot.to(tl.int64) * new_stride_t)[:, None] + d, mask=mask)
        tl.store(to, x, mask=mask)
    if is_encoded:
        source = new, staged, ahead, new_stride_t, page_stride
        COUNT: tl.constexpr = D if CHANNELS else N
        encode_block(source, page, n_old, ROWS, COUNT, CHANNELS, TILE, D, STAGED, staged.dtype.element_ty)


@step_kernel
def encode_kernel(
    key,  # [T, G, D]
    value,
    staged,  # pages [P, G] of the model's type
    ranking,  # [P, G, D, N / 2 | N], or bounds [P, G, N / 16, 2, D]
    scales,  # fp16 [P, G, D, 2]
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
    page_stride,  # of staged, in elements; the next lines alike for the other parts
    head_stride,
    ranking_stride_p,
    ranking_stride_g,
    scales_stride_p,
    scales_stride_g,
    tracked_stride_p,  # of positions and of scores
    tracked_stride_g,
    table_stride,
    n_requests,
    BEGUN: tl.constexpr,  # whether this is the first launch
    RANKING: tl.constexpr,
    POSITIONS: tl.constexpr,
    ATTENTION: tl.constexpr,
    SHIFTED: tl.constexpr,  # whether positions differ from slots
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    COPY_TILE: tl.constexpr,
    RANKING_TILE: tl.constexpr,
):
    """Grid (blocks, G, 2: K or V). The first launch has a program per request instead of one per block."""
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    if BEGUN:
        b, tile = pid, 0
    else:
        b, tile = find_request(query_start_loc, n_requests, pid, N, 2)
        if b < 0:
            return
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    context_len = tl.load(seq_lens + b)
    first = context_len - n_new
    block = first // N + tile
    if (n_new <= 0) | (first < 0) | (block * N >= context_len):  # first < 0: a padding row of a decode batch
        return
    n_old = tl.maximum(first - block * N, 0)
    stop = tl.minimum(context_len - block * N, N)
    is_staged = block == (context_len - 1) // N
    is_encoded = (stop == N) & (n_old == 0)
    if BEGUN:
        is_staged = False
        is_encoded = (stop == N) & (n_old > 0)
    table = block_table + b.to(tl.int64) * table_stride
    row = (start - first + block * N).to(tl.int64)  # of slot 0; before the tensor where that slot is old
    page = tl.load(table + block).to(tl.int64)
    staged += g * head_stride
    at = as_bytes(staged + page * page_stride)
    KEYS: tl.constexpr = FORMAT.keys
    VALUES: tl.constexpr = FORMAT.values
    CHANNELS: tl.constexpr = FORMAT.channel_keys
    PLACES: tl.constexpr = FORMAT.staged
    if tl.program_id(2) == 1:
        value += g * value_stride_g + row * value_stride_t
        write_side(
            *(
                value,
                staged + D,
                at,
                table + block + 1,
                n_old,
                stop,
                is_staged,
                is_encoded,
                value_stride_t,
                page_stride,
            ),
            *(VALUES, False, VALUE_TILE, COPY_TILE, N, D, D_PAD, PLACES),
        )
        return
    if POSITIONS and not BEGUN:  # of every block that tokens come to; staged tokens lie there no more
        tracked_at = page * tracked_stride_p + g * tracked_stride_g
        slot_0 = block * N
        if SHIFTED:
            slot_0 += tl.load(first_positions + b) - first
        track_arrivals(positions + tracked_at, scores + tracked_at, slot_0, n_old, stop, ATTENTION)
    key += g * key_stride_g + row * key_stride_t
    write_side(
        *(key, staged, at, table + block + 1, n_old, stop, is_staged, is_encoded, key_stride_t, page_stride),
        *(KEYS, CHANNELS, KEY_TILE, COPY_TILE, N, D, D_PAD, PLACES),
    )
    if RANKING is not None:  # noqa: SIM102  known at compile time, the rest is not
        if is_encoded:
            ranking += page * ranking_stride_p + g * ranking_stride_g
            scales += page * scales_stride_p + g * scales_stride_g
            close_page(
                *(key, staged, table + block + 1, ranking, scales, n_old, key_stride_t, page_stride),
                *(RANKING, N, D, D_PAD, RANKING_TILE, PLACES, None),
            )


def write_quantized(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None,
) -> None:
    """`vllm_sparq.ops.write.write` where there are tokens, and blocks that are encoded when they fill."""
    layout, n_requests = pages.layout, query_start_loc.shape[0] - 1
    (n_tokens, n_kv_heads, head_size), block_size = key.shape, layout.block_size
    codes = codes_of(layout)
    assert codes is not None
    # A part that the layout lacks is never touched: any pointer does.
    ranking = pages.ranking if layout.ranking else pages.data
    scales = pages.scales if layout.ranking in RANKING_BITS else pages.data
    d_pad = triton.next_power_of_2(head_size)
    strides = [t.stride(i) for t in (key, value, pages.staged, ranking, scales) for i in (0, 1)]
    positions, scores, *tracked_strides = tracked_parts(pages)
    shifted = layout.positions and first_positions is not None
    for begun in (True, False):
        n_programs = n_requests if begun else n_tokens // block_size + 2 * n_requests
        encode_kernel[(n_programs, n_kv_heads, 2)](
            *(key, value, pages.staged, ranking, scales, positions, scores),
            *(block_table, query_start_loc, seq_lens, first_positions if shifted else seq_lens),
            *(*strides, *tracked_strides, block_table.stride(0), n_requests),
            BEGUN=begun,
            RANKING=layout.ranking,
            POSITIONS=layout.positions,
            ATTENTION=layout.attention,
            SHIFTED=shifted,
            FORMAT=codes,
            N=block_size,
            D=head_size,
            D_PAD=d_pad,
            KEY_TILE=encode_tile(codes.keys, head_size if codes.channel_keys else block_size),
            VALUE_TILE=encode_tile(codes.values, block_size),
            COPY_TILE=16,
            RANKING_TILE=ranking_tile(block_size, d_pad),
            num_warps=4,
        )
    if layout.value_sum:
        write_sums(pages, block_table, query_start_loc, seq_lens)


def encode_tile(rows: Rows, count: int) -> int:
    """Rows of one step of `encode_block`: 32 elements a thread."""
    return int(min(triton.next_power_of_2(count), max(16, 4096 // max(rows.group_pad, rows.row_chunk))))
