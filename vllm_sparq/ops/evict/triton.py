"""`vllm_sparq.ops.evict.evict` on a GPU: three launches, or two without value sums; no sync, nothing sized by a length.

1. `choose_kernel`, a program per request and KV head: the key of the last token to stay, and which token moves where.
2. `move_kernel`, programs share the pages of a request and KV head (`triton_move`).
3. `sum_kernel`, a chain in block order after the first page that changed.

Scratch is 8 bytes for every token that a request may keep, and no more than 4 for every token that the block table
could hold; a batch whose scratch would exceed `SCRATCH_BYTES` runs in slices, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.evict.triton_move import move_kernel
from vllm_sparq.ops.triton_common.attend import pages_as_records
from vllm_sparq.ops.triton_common.attention_scores import tracked_parts
from vllm_sparq.ops.triton_common.codes import codes_of
from vllm_sparq.ops.triton_common.launch import aligned, slices, split_count, step_kernel
from vllm_sparq.ops.triton_common.value_sums import SUM_CHANNELS, SUM_TILE, chain_sums
from vllm_sparq.ops.write.triton_ranking import ranking_tile
from vllm_sparq.retention import Rank

CHOOSE_TILE = 1024
"""Tokens of one step of `choose_kernel`."""


@triton.jit
def keys_of(
    positions, scores, table, slot, n_held, sinks, recent_from, stride_p, N: tl.constexpr, ATTENTION: tl.constexpr
):
    """int64, not negative: who comes first in the order of `evict` has the larger key. All differ."""
    live = slot < n_held
    at = tl.load(table + slot // N, mask=live, other=0).to(tl.int64) * stride_p + slot % N
    position = tl.load(positions + at, mask=live, other=0)
    if ATTENTION:
        score = tl.load(scores + at, mask=live, other=0.0)
        finite = tl.minimum(tl.maximum(score, -3.4028234663852886e38), 3.4028234663852886e38)
        rank = tl.where(score == score, finite, float("-inf"))
    else:
        rank = position.to(tl.float32)
    rank = tl.where((position < sinks) | (position >= recent_from), float("inf"), rank)
    bits = tl.where(rank == 0.0, 0.0, rank).to(tl.int32, bitcast=True).to(tl.int64)
    order = tl.where(bits < 0, -1 - bits, bits + 2147483648)
    return (order << 31) | (2147483647 - position).to(tl.int64)


@step_kernel
def choose_kernel(
    positions,
    scores,
    block_table,
    seq_lens,
    kept_lens,
    recent_from,
    moves,  # int32 [rows, n_moves], written: by kept slot the slot whose token comes here, or -1; as many wait behind
    first_moves,  # int32 [rows], written: the first slot that gets a token, or the kept length
    tracked_stride_p,
    tracked_stride_g,
    table_stride,
    n_moves,
    sinks,
    G: tl.constexpr,
    N: tl.constexpr,
    ATTENTION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (B * G). Ten passes at most over 12 bytes a token, all but the first from L1 or L2.

    Radix select on 63 bits, 8 a pass, until a digit's tokens all stay; where one token goes, a minimum.
    """
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    n_held = tl.load(seq_lens + b)
    n_kept = tl.load(kept_lens + b)
    tl.store(first_moves + row, n_kept)
    if (n_kept >= n_held) | (n_kept == 0):  # nothing moves
        return
    recent = tl.load(recent_from + b)
    table = block_table + b * table_stride
    positions += g * tracked_stride_g
    scores += g * tracked_stride_g
    moves += row * n_moves
    lane = tl.arange(0, TILE)
    last = tl.zeros([], tl.int64)  # the least key that stays
    if n_held - n_kept == 1:
        least = tl.full([TILE], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, n_held, TILE):
            key = keys_of(positions, scores, table, first + lane, n_held, sinks, recent, tracked_stride_p, N, ATTENTION)
            least = tl.where(first + lane < n_held, tl.minimum(least, key), least)
        last = tl.min(least, 0) + 1
    else:
        digit = tl.arange(0, 256)
        shift = n_held * 0 + 56
        n_wanted = n_kept
        while shift >= 0:
            histogram = tl.zeros([256], tl.int32)
            for first in range(0, n_held, TILE):
                key = keys_of(
                    positions, scores, table, first + lane, n_held, sinks, recent, tracked_stride_p, N, ATTENTION
                )
                alive = (first + lane < n_held) & (((key >> shift) >> 8) == ((last >> shift) >> 8))
                histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alive)
            above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
            here = (above < n_wanted) & (above + histogram >= n_wanted)
            last |= tl.sum(tl.where(here, digit, 0), 0).to(tl.int64) << shift
            n_wanted -= tl.sum(tl.where(here, above, 0), 0)
            all_stay = tl.sum(tl.where(here, histogram, 0), 0) == n_wanted
            shift = tl.where(all_stay, -8, shift - 8)

    # The survivors after the kept slots wait in order in the part of the scratch that nothing moves to.
    n_waiting = n_kept
    for first in range(n_kept, n_held, TILE):
        slot = first + lane
        key = keys_of(positions, scores, table, slot, n_held, sinks, recent, tracked_stride_p, N, ATTENTION)
        survives = (slot < n_held) & (key >= last)
        tl.store(moves + n_waiting + tl.cumsum(survives.to(tl.int32), 0) - 1, slot, mask=survives)
        n_waiting += tl.sum(survives.to(tl.int32), 0)
    tl.debug_barrier()  # read by other threads than wrote them
    next_waiting = n_kept
    first_move = tl.zeros([TILE], tl.int32) + n_kept
    for first in range(0, n_kept, TILE):
        slot = first + lane
        key = keys_of(positions, scores, table, slot, n_held, sinks, recent, tracked_stride_p, N, ATTENTION)
        dead = (slot < n_kept) & (key < last)
        source = tl.load(moves + next_waiting + tl.cumsum(dead.to(tl.int32), 0) - 1, mask=dead, other=-1)
        tl.store(moves + slot, source, mask=slot < n_kept)
        next_waiting += tl.sum(dead.to(tl.int32), 0)
        first_move = tl.where(dead, tl.minimum(first_move, slot), first_move)
    tl.store(first_moves + row, tl.min(first_move, 0))


@step_kernel
def sum_kernel(
    records,  # pages [P, G] in the model's type
    value_sum,  # fp32 [P, G, D]
    block_table,
    kept_lens,
    first_moves,
    page_stride,
    head_stride,
    sum_stride_p,
    sum_stride_g,
    table_stride,
    G: tl.constexpr,
    FORMAT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
):
    """Grid (B * G, slices of the channels). Reads V, or its codes, from the first changed page on."""
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    changed = tl.load(first_moves + row) // N
    stop = tl.cdiv(tl.load(kept_lens + b), N)
    d = tl.program_id(1) * SUM_CHANNELS + tl.arange(0, SUM_CHANNELS)
    table = block_table + b * table_stride
    records += g * head_stride
    value_sum += g * sum_stride_g
    first = changed + 1
    chain_sums(records, value_sum, table, d, first, first, stop, page_stride, sum_stride_p, FORMAT, N, D, TILE)


def evict(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kept_lens: torch.Tensor,
    recent_from: torch.Tensor,
    *,
    sinks: int,
    rank: Rank,
    most_kept: int | None = None,
) -> None:
    n_requests, max_tokens = seq_lens.shape[0], block_table.shape[1] * pages.layout.block_size
    if n_requests == 0 or max_tokens == 0:
        return
    n_moves = max_tokens if most_kept is None else min(max_tokens, aligned(2 * most_kept))
    for rows in slices(n_requests, 4 * n_requests * n_moves * pages.data.shape[1]):
        evict_slice(pages, block_table[rows], seq_lens[rows], kept_lens[rows], recent_from[rows], sinks, rank, n_moves)


def evict_slice(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kept_lens: torch.Tensor,
    recent_from: torch.Tensor,
    sinks: int,
    rank: Rank,
    n_moves: int,
) -> None:
    """The requests whose scratch fits at once, ``n_moves`` entries for each."""
    layout, n_kv_heads, device = pages.layout, pages.data.shape[1], pages.data.device
    n, d = layout.block_size, layout.head_size
    n_rows, max_tokens = seq_lens.shape[0] * n_kv_heads, block_table.shape[1] * n
    moves = torch.empty(n_rows, n_moves, dtype=torch.int32, device=device)
    first_moves = torch.empty(n_rows, dtype=torch.int32, device=device)
    positions, scores, *tracked_strides = tracked_parts(pages)
    records, codes, table_stride = pages_as_records(pages), codes_of(layout), block_table.stride(0)
    choose_kernel[(n_rows,)](
        *(positions, scores, block_table, seq_lens, kept_lens, recent_from, moves, first_moves),
        *(*tracked_strides, table_stride, n_moves, sinks),
        G=n_kv_heads,
        N=n,
        ATTENTION=rank == "attention",
        TILE=CHOOSE_TILE,
        num_warps=8,
    )
    # A part that the layout lacks is never touched: any pointer does.
    ranking = pages.ranking if layout.ranking else pages.data
    scales = pages.scales if layout.ranking in RANKING_BITS else pages.data
    strides = [t.stride(i) for t in (records, ranking, scales) for i in (0, 1)]
    elements = codes.keys.runs * codes.keys.run_pad if codes is not None else 1
    move_kernel[(n_rows, split_count(n_rows, max_tokens, device, min_tokens=n))](
        *(records, ranking, scales, positions, scores, block_table, seq_lens, kept_lens, moves),
        *(*strides, *tracked_strides, table_stride, n_moves),
        G=n_kv_heads,
        ATTENTION=layout.attention,
        RANKING=layout.ranking,
        FORMAT=codes,
        N=n,
        N_PAD=triton.next_power_of_2(n),
        D=d,
        D_PAD=triton.next_power_of_2(d),
        TILE=16 if d <= 128 else 8,
        CHANNELS=min(triton.next_power_of_2(d), max(4, 1024 // elements)),
        RANKING_TILE=ranking_tile(n, triton.next_power_of_2(d)),
        num_warps=4 if d <= 256 else 8,
        enable_fp_fusion=False,  # what codes stand for is rounded twice, as everywhere
    )
    if layout.value_sum:
        value_sum = pages.value_sum
        sum_kernel[(n_rows, -(-d // SUM_CHANNELS))](
            *(records, value_sum, block_table, kept_lens, first_moves),
            *(records.stride(0), records.stride(1), value_sum.stride(0), value_sum.stride(1), table_stride),
            G=n_kv_heads,
            FORMAT=codes,
            N=n,
            D=d,
            TILE=SUM_TILE,
            SUM_CHANNELS=SUM_CHANNELS,
            num_warps=4,
        )
