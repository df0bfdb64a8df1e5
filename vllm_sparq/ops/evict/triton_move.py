"""Steps 2 and 3 of `evict` on a GPU: survivors move, and their new pages make again what they derive from tokens.

A program owns a page that gets tokens; beside that page it reads only slots after the kept ones, which nobody writes.
So programs of one launch never meet. A page in codes is a little work more:

* a token's codes and scales move as they are, in words; from the newest block, which is staged, they are made here;
* channel-major K is decoded, a slice of channels of the whole page at a time, with the arriving tokens put in place;
  then every group that one of them joins is quantized again. All of it happens in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.codes import gather, staged_at
from vllm_sparq.ops.triton_common.encode import renew_rows
from vllm_sparq.ops.triton_common.launch import cast, step_kernel, widen
from vllm_sparq.ops.triton_common.unpack import as_bytes
from vllm_sparq.ops.write.triton_ranking import close_page


@triton.jit
def move_tracked(positions, scores, table, to, slot, source, stride_p, N: tl.constexpr, ATTENTION: tl.constexpr):
    """Positions and scores of the slots ``source`` of a request, where not negative, go to ``slot`` of page ``to``."""
    moved = source >= 0
    page = tl.load(table + source // N, mask=moved, other=0).to(tl.int64)
    at = page * stride_p + source % N
    tl.store(positions + to * stride_p + slot, tl.load(positions + at, mask=moved, other=0), mask=moved)
    if ATTENTION:
        tl.store(scores + to * stride_p + slot, tl.load(scores + at, mask=moved, other=0.0), mask=moved)


@triton.jit
def move_records(records, table, moves, to, n_slots, page_stride, N: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """K and V to the first ``n_slots`` slots of a page of the model's type, in one run each: 2 D elements."""
    WIDTH: tl.constexpr = 64
    for first in range(0, n_slots, TILE):
        slot = first + tl.arange(0, TILE)
        source = tl.load(moves + slot, mask=slot < n_slots, other=-1)
        if tl.max(source, 0) >= 0:
            page = tl.load(table + source // N, mask=source >= 0, other=0).to(tl.int64)
            old = records + page * page_stride + source % N * (2 * D)
            new = records + to * page_stride + slot * (2 * D)
            for begin in range(0, 2 * D, WIDTH):
                element = begin + tl.arange(0, WIDTH)
                mask = (source >= 0)[:, None] & (element < 2 * D)[None, :]
                tl.store(
                    new[:, None] + element[None, :], tl.load(old[:, None] + element[None, :], mask=mask), mask=mask
                )


@triton.jit
def move_words(old, new, moved, N_BYTES: tl.constexpr):
    """``N_BYTES`` bytes, a multiple of 4, between addresses [TILE]; chunks of 64 words."""
    word_type: tl.constexpr = tl.pointer_type(tl.int32)
    old = old.to(word_type, bitcast=True)
    new = new.to(word_type, bitcast=True)
    for begin in range(0, N_BYTES // 4, 64):
        word = begin + tl.arange(0, 64)
        mask = moved[:, None] & (word < N_BYTES // 4)[None, :]
        tl.store(new[:, None] + word[None, :], tl.load(old[:, None] + word[None, :], mask=mask), mask=mask)


@triton.jit
def encode_arrivals(
    records,
    table,
    source,
    slot,
    staged,
    page,
    page_stride,
    side,  # 0, or D for V
    ROWS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Codes of K or V of the ``staged`` tokens ``source``, for their rows ``slot`` of the page; all [TILE]."""
    place = tl.arange(0, ROWS.runs * ROWS.run_pad)
    element = place // ROWS.run_pad * ROWS.run + place % ROWS.run_pad
    inside = place % ROWS.run_pad < ROWS.run
    ahead, at = staged_at(table, source, staged, N, PLACES)
    old = records + ahead.to(tl.int64) * page_stride + at * (2 * D) + side
    x = tl.load(old[:, None] + element[None, :], mask=staged[:, None] & inside[None, :], other=0.0)
    x = widen(x)
    renew_rows(x, tl.zeros(x.shape, tl.int32), inside, page, slot, staged, ROWS, records.dtype.element_ty)


@triton.jit
def move_rows(
    records,
    table,
    moves,
    page,  # pointer to the page's first byte
    n_held,
    page_stride,
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Token-major codes and scales: of K and V, or of V where K is channel-major."""
    KEYS: tl.constexpr = FORMAT.keys
    VALUES: tl.constexpr = FORMAT.values
    newest = (n_held - 1) // N
    for first in range(0, N, TILE):
        slot = first + tl.arange(0, TILE)
        source = tl.load(moves + slot, mask=slot < N, other=-1)
        if tl.max(source, 0) >= 0:
            staged = (source >= 0) & (source // N == newest)
            coded = (source >= 0) & (source // N != newest)
            from_page = tl.load(table + source // N, mask=coded, other=0).to(tl.int64)
            old = as_bytes(records) + from_page * page_stride * KEYS.number_bytes
            there, here = source % N, slot
            if FORMAT.channel_keys:
                move_words(
                    *(old + VALUES.codes + there * VALUES.codes_step, page + VALUES.codes + here * VALUES.codes_step),
                    *(coded, VALUES.run),
                )
                scales = VALUES.scales
                move_words(
                    *(old + scales + there * VALUES.scales_step, page + scales + here * VALUES.scales_step),
                    *(coded, VALUES.scales_step),
                )
            else:
                move_words(
                    *(old + KEYS.codes + there * KEYS.codes_step, page + KEYS.codes + here * KEYS.codes_step),
                    *(coded, KEYS.codes_step),
                )
            if tl.max(staged.to(tl.int32), 0) > 0:
                shared = records, table, source, slot, staged, page, page_stride
                encode_arrivals(*shared, D, VALUES, N, D, FORMAT.staged)
                if not FORMAT.channel_keys:
                    encode_arrivals(*shared, 0, KEYS, N, D, FORMAT.staged)


@triton.jit
def requantize_keys(
    records,
    table,
    moves,
    page,  # pointer to the page's first byte
    n_held,
    page_stride,
    N: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Channel-major K of a page that some tokens join."""
    KEYS: tl.constexpr = FORMAT.keys
    dtype: tl.constexpr = records.dtype.element_ty
    place = tl.arange(0, KEYS.runs * KEYS.run_pad)
    run, byte = place // KEYS.run_pad, place % KEYS.run_pad
    inside, slot = byte < KEYS.run, run * KEYS.run + byte
    source = tl.load(moves + slot, mask=inside, other=-1)
    newest = (n_held - 1) // N
    staged = (source >= 0) & (source // N == newest)
    coded = (source >= 0) & (source // N != newest)
    from_page = tl.load(table + source // N, mask=coded, other=0).to(tl.int64)
    old = as_bytes(records) + from_page * page_stride * KEYS.number_bytes
    ahead, at = staged_at(table, source, staged, N, FORMAT.staged)
    waiting = records + ahead.to(tl.int64) * page_stride + at * (2 * D)
    stays = inside & (source < 0)
    for first in range(0, D, CHANNELS):
        d = first + tl.arange(0, CHANNELS)
        mask = (d < D)[:, None] & inside[None, :]
        own = gather(page, d[:, None], slot[None, :], mask & stays[None, :], KEYS, dtype)
        other = gather(old[None, :], d[:, None], (source % N)[None, :], mask & coded[None, :], KEYS, dtype)
        exact = tl.load(waiting[None, :] + d[:, None], mask=mask & staged[None, :], other=0.0)
        x = widen(cast(tl.where(stays[None, :], own, other), dtype))
        x = tl.where(staged[None, :], widen(exact), x)
        packed = tl.load(page + KEYS.codes + (d * KEYS.codes_step)[:, None] + byte[None, :], mask=mask, other=0)
        codes = (packed.to(tl.int32) >> (run * KEYS.bits)[None, :]) & ((1 << KEYS.bits) - 1)
        renew_rows(x, codes, source >= 0, page, d, d < D, KEYS, dtype)


@step_kernel
def move_kernel(
    records,  # pages [P, G] in the model's type; the value of a record lies D elements after its key
    ranking,  # [P, G, D, N / 2 | N]
    scales,  # fp16 [P, G, D, 2]
    positions,  # int32 [P, G, N]
    scores,  # fp32 [P, G, N]
    block_table,
    seq_lens,
    kept_lens,
    moves,  # int32 [rows, n_moves], by slot the slot whose token comes here, or -1
    page_stride,
    head_stride,
    ranking_stride_p,
    ranking_stride_g,
    scales_stride_p,
    scales_stride_g,
    tracked_stride_p,
    tracked_stride_g,
    table_stride,
    n_moves,
    G: tl.constexpr,
    ATTENTION: tl.constexpr,
    RANKING: tl.constexpr,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANKING_TILE: tl.constexpr,
):
    """Grid (B * G, programs that share the pages of a row). Reads 4 bytes per kept token, and what moves."""
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    n_held = tl.load(seq_lens + b)
    n_kept = tl.load(kept_lens + b)
    if n_kept >= n_held:
        return
    table = block_table + b * table_stride
    moves += row * n_moves
    records += g * head_stride
    positions += g * tracked_stride_g
    scores += g * tracked_stride_g
    for block in range(tl.program_id(1), tl.cdiv(n_kept, N), tl.num_programs(1)):
        slot = tl.arange(0, N_PAD)
        n_slots = tl.minimum(n_kept - block * N, N)
        here = moves + block * N
        source = tl.load(here + slot, mask=slot < n_slots, other=-1)
        if tl.max(source, 0) >= 0:
            page = tl.load(table + block).to(tl.int64)
            move_tracked(positions, scores, table, page, slot, source, tracked_stride_p, N, ATTENTION)
            at = as_bytes(records + page * page_stride)
            if FORMAT is None:
                move_records(records, table, here, page, n_slots, page_stride, N, D, TILE)
            else:
                move_rows(records, table, here, at, n_held, page_stride, N, D, TILE, FORMAT)
                if FORMAT.channel_keys:
                    requantize_keys(records, table, here, at, n_held, page_stride, N, D, CHANNELS, FORMAT)
            if RANKING is not None:  # noqa: SIM102  known at compile time, the rest is not
                if n_slots == N:
                    tl.debug_barrier()  # the copy reads what other threads wrote
                    ranking_at = ranking + page * ranking_stride_p + g * ranking_stride_g
                    scales_at = scales + page * scales_stride_p + g * scales_stride_g
                    keys_at = records + page * page_stride if FORMAT is None else at
                    close_page(
                        *(records, keys_at, table, ranking_at, scales_at, N, 0, page_stride),
                        *(RANKING, N, D, D_PAD, RANKING_TILE, 0, FORMAT),
                    )
