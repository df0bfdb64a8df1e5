"""Step 3 of `sparq_decode` and of `quest_decode` on a GPU: the exact top k of each row, no sort, three launches.

1. `count_kernel` sorts the scores of each split into 256 bins that rise with the score.
2. `partition_kernel` finds the bin in which the k-th score lies. Everything above is picked; the bin itself, about one
   token in a hundred, becomes the list of candidates. All positions follow from the counts: no atomics, one result.
3. `finish_kernel` picks the rest from the candidates by radix select on the 32 bits of a score, ties to the oldest.

A picked token is written as its cell, ``page * N + slot``; where it is staged, as ``~(page * N + place)``.
The order of the list is fixed but has no meaning.
Rows that are read densely list all their tokens.

With a ``READ.span`` what is ranked and picked are spans of so many tokens, and all tokens of a picked one are written.
The newest span may be short: it is not ranked, but listed after all others.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.codes import cell_of
from vllm_sparq.ops.triton_common.launch import read_counts, split_tokens

N_BINS = tl.constexpr(256)
"""More would narrow the candidates, but each split stores its counts, and each split of the row reads all of them."""

LEAST_EXPONENT = tl.constexpr(100)
"""Exponent field of the probability (2^-27) that the lowest bin of ``probs`` starts at; 8 bins to the octave."""


@triton.jit
def items_of(context_len, n_read, READ: tl.constexpr):
    """(items, how many of them to read): tokens, or spans but for the newest."""
    n_items = context_len if READ.span == 1 else tl.cdiv(context_len, READ.span) - 1
    return n_items, n_items - (context_len - n_read) // READ.span


@triton.jit
def mark_newest(score, positions, table, t, live, n_local, context_len, stride_p, N: tl.constexpr):
    """Infinity where the position of the token ``t`` is among the ``n_local`` newest; ``positions`` of one KV head."""
    last = context_len - 1
    newest = tl.load(positions + tl.load(table + last // N).to(tl.int64) * stride_p + last % N)
    page = tl.load(table + t // N, mask=live, other=0).to(tl.int64)
    position = tl.load(positions + page * stride_p + t % N, mask=live, other=0)
    return tl.where(position > newest - n_local, float("inf"), score)


@triton.jit
def is_ranked(score, t, n_ranked, POSITIONS: tl.constexpr):
    """Whether tokens must earn their place, and are not local: found by slot, or by what `mark_newest` left."""
    if POSITIONS:
        return score != float("inf")
    else:
        return t < n_ranked


@triton.jit
def bin_of(score, t, n_ranked, low, per_unit, PROBS: tl.constexpr, POSITIONS: tl.constexpr):
    """Monotonic in the score, in fp32 arithmetic too; the local tokens are on top."""
    ranked = is_ranked(score, t, n_ranked, POSITIONS)
    if PROBS:
        index = (score.to(tl.int32, bitcast=True) >> 20) - LEAST_EXPONENT * 8
    else:
        if POSITIONS:
            score = tl.where(score == float("inf"), low, score)
        index = ((score - low) * per_unit).to(tl.int32)
    index = tl.minimum(tl.maximum(index, 0), N_BINS - 1)
    return tl.where(ranked, index, N_BINS - 1)


@triton.jit
def bin_scale(extent, row, N_SPLITS: tl.constexpr, PROBS: tl.constexpr):
    """(least score, bins per unit of score) of a row."""
    if PROBS:
        return 0.0, 0.0
    split = tl.arange(0, N_SPLITS)
    low = tl.min(tl.load(extent + (row * N_SPLITS + split) * 2), 0)
    high = tl.max(tl.load(extent + (row * N_SPLITS + split) * 2 + 1), 0)
    return low, tl.where(high > low, 255.0 / (high - low), 0.0)


@triton.jit
def head_statistics(tops, sums, row, h, N_SPLITS: tl.constexpr, HEADS: tl.constexpr):
    """(largest score, sum of exponentials below it) of one head over the whole row."""
    at = (row * N_SPLITS + tl.arange(0, N_SPLITS)) * HEADS + h
    split_tops = tl.load(tops + at)
    top = tl.max(split_tops, 0)
    return top, tl.sum(tl.load(sums + at) * tl.exp(split_tops - top), 0)


@triton.jit
def row_statistics(tops, sums, row, N_SPLITS: tl.constexpr, HEADS: tl.constexpr):
    """`head_statistics` of every head: two tuples."""
    row_tops = ()
    row_sums = ()
    for h in tl.static_range(HEADS):
        top, total = head_statistics(tops, sums, row, h, N_SPLITS, HEADS)
        row_tops = row_tops + (top,)
        row_sums = row_sums + (total,)
    return row_tops, row_sums


@triton.jit
def count_kernel(
    positions,  # int32 [P, G, N]
    block_table,
    seq_lens,
    scores,  # fp32 [rows, max_tokens]; PROBS: written here
    head_scores,  # [rows, HEADS, max_tokens]
    extent,
    tops,
    sums,
    counts,  # int32 [rows, N_SPLITS, N_BINS], written
    tracked_stride_p,
    tracked_stride_g,
    table_stride,
    max_tokens,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    PROBS: tl.constexpr,
    POSITIONS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 4 bytes per token, from L2 mostly; PROBS 4 per head, and writes 4."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    context_len = tl.load(seq_lens + row // G)
    is_dense, n_read, n_local = read_counts(context_len, READ)
    if is_dense:
        return
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    n_items, _ = items_of(context_len, n_read, READ)
    n_ranked = n_items - n_local
    low, per_unit = bin_scale(extent, row, N_SPLITS, PROBS)
    if PROBS:
        row_tops, row_sums = row_statistics(tops, sums, row, N_SPLITS, HEADS)
    histogram = tl.zeros([N_BINS], tl.int32)
    start, stop = split_tokens(n_items, split, N_SPLITS, TILE)
    for first in range(start, stop, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop
        if PROBS:
            s = tl.zeros([TILE], tl.float32)
            for h in tl.static_range(HEADS):
                own = tl.load(head_scores + h * max_tokens + t, mask=live, other=0.0).to(tl.float32)
                s += tl.exp(own - row_tops[h]) / row_sums[h]
            if POSITIONS:
                own_positions = positions + row % G * tracked_stride_g
                table = block_table + row // G * table_stride
                s = mark_newest(s, own_positions, table, t, live, n_local, context_len, tracked_stride_p, N)
            tl.store(scores + t, s, mask=live)
        else:
            s = tl.load(scores + t, mask=live, other=0.0)
        histogram += tl.histogram(bin_of(s, t, n_ranked, low, per_unit, PROBS, POSITIONS), N_BINS, mask=live)
    tl.store(counts + (row * N_SPLITS + split) * N_BINS + tl.arange(0, N_BINS), histogram)


@triton.jit
def append_cells(cells, n, table, t, chosen, context_len, N: tl.constexpr, STAGED: tl.constexpr, READ: tl.constexpr):
    """Append the cells of the chosen items of a tile to a list of ``n`` items; returns its new length."""
    place = n + tl.cumsum(chosen.to(tl.int32), 0) - 1
    n += tl.sum(chosen.to(tl.int32), 0)
    if READ.span > 1:
        within = tl.arange(0, READ.span)[None, :]
        t = t[:, None] * READ.span + within
        place = place[:, None] * READ.span + within
        chosen = chosen[:, None] & (t < context_len)
    tl.store(cells + place, cell_of(table, t, chosen, context_len, N, STAGED), mask=chosen)
    return n


@triton.jit
def find_bin(counts, row, split, n_read, N_SPLITS: tl.constexpr, STEP: tl.constexpr):
    """The bin of the last token to read, then tokens (above it, in it) in the row, and in the splits before."""
    index = tl.arange(0, N_BINS)
    total = tl.zeros([N_BINS], tl.int32)
    before = tl.zeros([N_BINS], tl.int32)
    for first in range(0, N_SPLITS, STEP):
        other = first + tl.arange(0, STEP)
        at = (row * N_SPLITS + other)[:, None] * N_BINS + index[None, :]
        n = tl.load(counts + at)
        total += tl.sum(n, 0)
        before += tl.sum(tl.where((other < split)[:, None], n, 0), 0)
    above = tl.sum(total, 0) - tl.cumsum(total, 0)
    last = tl.sum(tl.where((above < n_read) & (above + total >= n_read), index, 0), 0)
    n_above = tl.sum(tl.where(index > last, total, 0), 0)
    n_in = tl.sum(tl.where(index == last, total, 0), 0)
    above_before = tl.sum(tl.where(index > last, before, 0), 0)
    in_before = tl.sum(tl.where(index == last, before, 0), 0)
    return last, n_above, n_in, above_before, in_before


@triton.jit
def add_shares(shares, head_scores, t, chosen, tops, max_tokens, HEADS: tl.constexpr):
    """Per lane and head, the exponentials of the chosen tokens' scores."""
    result = ()
    for h in tl.static_range(HEADS):
        s = tl.load(head_scores + h * max_tokens + t, mask=chosen, other=0.0).to(tl.float32)
        result = result + (shares[h] + tl.where(chosen, tl.exp(s - tops[h]), 0.0),)
    return result


@triton.jit
def store_shares(shares, lane_shares, HEADS: tl.constexpr):
    """[HEADS] sums over the lanes."""
    for h in tl.static_range(HEADS):
        tl.store(shares + h, tl.sum(lane_shares[h], 0))


@triton.jit
def partition_kernel(
    block_table,
    seq_lens,
    scores,
    head_scores,
    extent,
    tops,
    sums,
    counts,
    cells,  # int32 [rows, capacity], written: cells of tokens to read
    candidates,  # int32 [rows, max_tokens], written: tokens of the last bin, ascending
    pending,  # int32 [rows, 2], written: cells in the list so far, and candidates
    shares,  # fp32 [rows, N_SPLITS + 1, HEADS], written with STATISTICS: exponentials of the tokens listed
    table_stride,
    max_tokens,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PROBS: tl.constexpr,
    POSITIONS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 4 bytes per token; STATISTICS at most 32 more per query head and token picked."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    context_len = tl.load(seq_lens + row // G)
    is_dense, n_read, n_local = read_counts(context_len, READ)
    table = block_table + row // G * table_stride
    cells += row * capacity
    if is_dense:
        start, stop = split_tokens(context_len, split, N_SPLITS, TILE)
        for first in range(start, stop, TILE):
            t = first + tl.arange(0, TILE)
            tl.store(cells + t, cell_of(table, t, t < stop, context_len, N, STAGED), mask=t < stop)
        return

    n_items, n_wanted = items_of(context_len, n_read, READ)
    start, stop = split_tokens(n_items, split, N_SPLITS, TILE)
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    candidates += row * max_tokens
    low, per_unit = bin_scale(extent, row, N_SPLITS, PROBS)
    last, n_above, n_in, n_cells, n_candidates = find_bin(counts, row, split, n_wanted, N_SPLITS, min(N_SPLITS, 8))
    if split == 0:
        tl.store(pending + row * 2, n_above)
        tl.store(pending + row * 2 + 1, n_in)
    if STATISTICS:
        row_tops, _ = row_statistics(tops, sums, row, N_SPLITS, HEADS)
        lane_shares = (tl.zeros([TILE], tl.float32),) * HEADS
    for first in range(start, stop, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop
        s = tl.load(scores + t, mask=live, other=0.0)
        index = bin_of(s, t, n_items - n_local, low, per_unit, PROBS, POSITIONS)
        chosen = live & (index > last)
        n_cells = append_cells(cells, n_cells, table, t, chosen, context_len, N, STAGED, READ)
        if STATISTICS:
            lane_shares = add_shares(lane_shares, head_scores, t, chosen, row_tops, max_tokens, HEADS)
        waiting = (live & (index == last)).to(tl.int32)
        tl.store(candidates + n_candidates + tl.cumsum(waiting, 0) - 1, t, mask=waiting > 0)
        n_candidates += tl.sum(waiting, 0)
    if STATISTICS:
        store_shares(shares + (row * (N_SPLITS + 1) + split) * HEADS, lane_shares, HEADS)


@triton.jit
def sort_key(score, t, n_ranked, POSITIONS: tl.constexpr):
    """uint32 that orders as the fp32 score does, both zeros alike; the local tokens are on top."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
    return tl.where(is_ranked(score, t, n_ranked, POSITIONS), key, 0xFFFFFFFF)


@triton.jit
def find_threshold(candidates, scores, n_candidates, n_wanted, n_ranked, TILE: tl.constexpr, POSITIONS: tl.constexpr):
    """Key of the last candidate to read, and how many with that very key to read: radix select, 8 bits a pass."""
    threshold = tl.zeros([], tl.uint32)
    index = tl.arange(0, N_BINS)
    for shift in tl.static_range(24, -8, -8):
        histogram = tl.zeros([N_BINS], tl.int32)
        for first in range(0, n_candidates, TILE):
            i = first + tl.arange(0, TILE)
            t = tl.load(candidates + i, mask=i < n_candidates, other=0)
            key = sort_key(tl.load(scores + t, mask=i < n_candidates, other=0.0), t, n_ranked, POSITIONS)
            alive = i < n_candidates
            if shift < 24:
                alive &= (key >> (shift + 8)) == (threshold >> (shift + 8))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), N_BINS, mask=alive)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        here = (above < n_wanted) & (above + histogram >= n_wanted)
        threshold |= tl.sum(tl.where(here, index, 0), 0).to(tl.uint32) << shift
        n_wanted -= tl.sum(tl.where(here, above, 0), 0)
    return threshold, n_wanted


@triton.jit
def finish_kernel(
    block_table,
    seq_lens,
    scores,
    head_scores,
    tops,
    sums,
    cells,
    candidates,
    pending,
    shares,
    table_stride,
    max_tokens,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    POSITIONS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G). Touches the candidates only: five passes over 8 bytes each, all but the first from L1."""
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(seq_lens + row // G)
    is_dense, n_read, n_local = read_counts(context_len, READ)
    if is_dense:
        return
    table = block_table + row // G * table_stride
    cells += row * capacity
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    candidates += row * max_tokens
    n_items, n_wanted = items_of(context_len, n_read, READ)
    n_ranked = n_items - n_local
    n_cells = tl.load(pending + row * 2)
    n_candidates = tl.load(pending + row * 2 + 1)
    threshold, n_equal = find_threshold(candidates, scores, n_candidates, n_wanted - n_cells, n_ranked, TILE, POSITIONS)
    seen = n_cells * 0
    if STATISTICS:
        row_tops, _ = row_statistics(tops, sums, row, N_SPLITS, HEADS)
        lane_shares = (tl.zeros([TILE], tl.float32),) * HEADS
    for first in range(0, n_candidates, TILE):
        i = first + tl.arange(0, TILE)
        live = i < n_candidates
        t = tl.load(candidates + i, mask=live, other=0)
        key = sort_key(tl.load(scores + t, mask=live, other=0.0), t, n_ranked, POSITIONS)
        equal = live & (key == threshold)
        oldest = seen + tl.cumsum(equal.to(tl.int32), 0) <= n_equal  # candidates ascend
        chosen = (live & (key > threshold)) | (equal & oldest)
        seen += tl.sum(equal.to(tl.int32), 0)
        n_cells = append_cells(cells, n_cells, table, t, chosen, context_len, N, STAGED, READ)
        if STATISTICS:
            lane_shares = add_shares(lane_shares, head_scores, t, chosen, row_tops, max_tokens, HEADS)
    if STATISTICS:
        store_shares(shares + (row * (N_SPLITS + 1) + N_SPLITS) * HEADS, lane_shares, HEADS)
    if READ.span > 1:
        newest = n_items + tl.zeros([1], tl.int32)
        append_cells(cells, n_cells, table, newest, newest == newest, context_len, N, STAGED, READ)
