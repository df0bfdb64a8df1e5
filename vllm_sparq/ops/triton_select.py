"""Step 3 of `sparq_decode` on a GPU: the exact top k of each row, without a sort, in three launches.

1. `count_kernel` sorts the scores of each split into 256 bins that rise with the score.
2. `partition_kernel` finds the bin in which the k-th score lies. Everything above is picked; the bin itself, about one
   token in a hundred, becomes the list of candidates. All positions follow from the counts: no atomics, one result.
3. `finish_kernel` picks the rest from the candidates by radix select on the 32 bits of their scores, ties to the oldest.

A picked token is written as its cell, ``page * N + slot``. The order of the list is fixed but has no meaning.
Rows that are read densely list all their tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common import read_counts
from vllm_sparq.ops.triton_score import score_tile, score_tokens, split_pages

N_BINS = tl.constexpr(256)
"""More would narrow the candidates, but each split stores its counts, and each split of the row reads all of them."""

LEAST_EXPONENT = tl.constexpr(100)
"""Exponent field of the probability (2^-27) that the lowest bin of ``probs`` starts at; 8 bins to the octave."""


@triton.jit
def bin_of(score, t, n_ranked, low, per_unit, PROBS: tl.constexpr):
    """Monotonic in the score, in fp32 arithmetic too; the local tokens are on top."""
    if PROBS:
        index = (score.to(tl.int32, bitcast=True) >> 20) - LEAST_EXPONENT * 8
    else:
        index = ((score - low) * per_unit).to(tl.int32)
    index = tl.minimum(tl.maximum(index, 0), N_BINS - 1)
    return tl.where(t < n_ranked, index, N_BINS - 1)


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
def group_probability(scores, tops, sums, row, N_SPLITS: tl.constexpr, HEADS: tl.constexpr):
    """The sum over the heads of the softmax of their scores."""
    total = tl.zeros(scores[0].shape, tl.float32)
    for h in tl.static_range(HEADS):
        top, size = head_statistics(tops, sums, row, h, N_SPLITS, HEADS)
        total += tl.exp(scores[h] - top) / size
    return total


@triton.jit
def count_kernel(
    records,
    scoring,
    ranges,
    block_table,
    seq_lens,
    channels,
    weights,
    scores,  # fp32 [rows, max_tokens]; PROBS: written here
    extent,
    tops,
    sums,
    counts,  # int32 [rows, N_SPLITS, N_BINS], written
    page_stride,
    head_stride,
    scoring_stride_p,
    scoring_stride_g,
    ranges_stride_p,
    ranges_stride_g,
    table_stride,
    max_tokens,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SCORING: tl.constexpr,
    PROBS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 4 bytes per token, from L2 mostly; PROBS scores all tokens again and writes 4 more."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, g = row // G, row % G
    context_len = tl.load(seq_lens + b)
    is_dense, _, n_local = read_counts(context_len, MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
    if is_dense:
        return
    scores += row * max_tokens
    first, stop = split_pages(context_len, split, N, N_SPLITS, PAGES)
    if PROBS:
        HALF: tl.constexpr = N // 2
        for first_page in range(first, stop, PAGES):
            for first_slot in range(0, HALF, SLOTS):
                early, late = score_tile(
                    *(weights + row * HEADS * R, channels + row * R, records + g * head_stride),
                    *(scoring + g * scoring_stride_g, ranges + g * ranges_stride_g, block_table + b * table_stride),
                    *(first_page, first_slot, context_len, page_stride, scoring_stride_p, ranges_stride_p),
                    *(SCORING, HEADS, R, N, D, PAGES, SLOTS),
                )
                slot = first_slot + tl.arange(0, SLOTS)[None, :]
                t = (first_page + tl.arange(0, PAGES))[:, None] * N + slot
                p = group_probability(early, tops, sums, row, N_SPLITS, HEADS)
                tl.store(scores + t, p, mask=(slot < HALF) & (t < context_len))
                p = group_probability(late, tops, sums, row, N_SPLITS, HEADS)
                tl.store(scores + t + HALF, p, mask=(slot < HALF) & (t + HALF < context_len))
        tl.debug_barrier()
    low, per_unit = bin_scale(extent, row, N_SPLITS, PROBS)
    histogram = tl.zeros([N_BINS], tl.int32)
    stop_token = tl.minimum(stop * N, context_len)
    for first_token in range(first * N, stop_token, TILE):
        t = first_token + tl.arange(0, TILE)
        live = t < stop_token
        s = tl.load(scores + t, mask=live, other=0.0)
        histogram += tl.histogram(bin_of(s, t, context_len - n_local, low, per_unit, PROBS), N_BINS, mask=live)
    tl.store(counts + (row * N_SPLITS + split) * N_BINS + tl.arange(0, N_BINS), histogram)


@triton.jit
def append_cells(cells, n, table, t, chosen, N: tl.constexpr):
    """Append the cells of the chosen tokens of a tile to a list of ``n``; returns its new length."""
    place = n + tl.cumsum(chosen.to(tl.int32), 0) - 1
    page = tl.load(table + t // N, mask=chosen, other=0)
    tl.store(cells + place, page * N + t % N, mask=chosen)
    return n + tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def find_bin(counts, row, split, n_read, N_SPLITS: tl.constexpr, STEP: tl.constexpr):
    """The bin of the last token to read, and (tokens above it, tokens in it) in the row and in the splits before this."""
    index = tl.arange(0, N_BINS)
    total = tl.zeros([N_BINS], tl.int32)
    before = tl.zeros([N_BINS], tl.int32)
    for first in range(0, N_SPLITS, STEP):
        other = first + tl.arange(0, STEP)
        at = (row * N_SPLITS + other)[:, None] * N_BINS + index[None, :]
        n = tl.load(counts + at)
        total += tl.sum(n, 0)
        before += tl.sum(tl.where((other < split)[:, None], n, 0), 0)
    above = tl.cumsum(total, 0, reverse=True) - total
    last = tl.sum(tl.where((above < n_read) & (above + total >= n_read), index, 0), 0)
    n_above = tl.sum(tl.where(index > last, total, 0), 0)
    n_in = tl.sum(tl.where(index == last, total, 0), 0)
    above_before = tl.sum(tl.where(index > last, before, 0), 0)
    in_before = tl.sum(tl.where(index == last, before, 0), 0)
    return last, n_above, n_in, above_before, in_before


@triton.jit
def add_shares(shares, scores, chosen, tops, HEADS: tl.constexpr):
    """Per lane and head, the exponentials of the chosen tokens' scores."""
    result = ()
    for h in tl.static_range(HEADS):
        result = result + (shares[h] + tl.where(chosen, tl.exp(scores[h] - tops[h]), 0.0),)
    return result


@triton.jit
def row_tops(tops, sums, row, N_SPLITS: tl.constexpr, HEADS: tl.constexpr):
    """The largest score of each head: a tuple of scalars."""
    result = ()
    for h in tl.static_range(HEADS):
        top, _ = head_statistics(tops, sums, row, h, N_SPLITS, HEADS)
        result = result + (top,)
    return result


@triton.jit
def partition_kernel(
    records,
    scoring,
    ranges,
    block_table,
    seq_lens,
    channels,
    weights,
    scores,
    extent,
    tops,
    sums,
    counts,
    cells,  # int32 [rows, capacity], written: cells of tokens to read
    candidates,  # int32 [rows, max_tokens], written: tokens of the last bin, ascending
    pending,  # int32 [rows, 2], written: cells in the list so far, and candidates
    shares,  # fp32 [rows, N_SPLITS + 1, HEADS], written with STATISTICS: exponentials of the tokens listed
    page_stride,
    head_stride,
    scoring_stride_p,
    scoring_stride_g,
    ranges_stride_p,
    ranges_stride_g,
    table_stride,
    max_tokens,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SCORING: tl.constexpr,
    STATISTICS: tl.constexpr,
    PROBS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 4 bytes per token; STATISTICS scores all tokens again: r / 2 bytes more.

    Scoring again beats keeping the scores of every head: those are 4 bytes per token and query head, written and read.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, g = row // G, row % G
    context_len = tl.load(seq_lens + b)
    is_dense, n_read, n_local = read_counts(context_len, MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
    table = block_table + b * table_stride
    cells += row * capacity
    scores += row * max_tokens
    candidates += row * max_tokens
    first, stop = split_pages(context_len, split, N, N_SPLITS, PAGES)
    stop_token = tl.minimum(stop * N, context_len)
    if is_dense:
        for first_token in range(first * N, stop_token, TILE):
            t = first_token + tl.arange(0, TILE)
            page = tl.load(table + t // N, mask=t < stop_token, other=0)
            tl.store(cells + t, page * N + t % N, mask=t < stop_token)
        return

    low, per_unit = bin_scale(extent, row, N_SPLITS, PROBS)
    last, n_above, n_in, n_cells, n_candidates = find_bin(counts, row, split, n_read, N_SPLITS, min(N_SPLITS, 8))
    if split == 0:
        tl.store(pending + row * 2, n_above)
        tl.store(pending + row * 2 + 1, n_in)
    n_ranked = context_len - n_local
    for first_token in range(first * N, stop_token, TILE):
        t = first_token + tl.arange(0, TILE)
        live = t < stop_token
        index = bin_of(tl.load(scores + t, mask=live, other=0.0), t, n_ranked, low, per_unit, PROBS)
        n_cells = append_cells(cells, n_cells, table, t, live & (index > last), N)
        chosen = live & (index == last)
        place = n_candidates + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(candidates + place, t, mask=chosen)
        n_candidates += tl.sum(chosen.to(tl.int32), 0)

    if STATISTICS:
        HALF: tl.constexpr = N // 2
        head_tops = row_tops(tops, sums, row, N_SPLITS, HEADS)
        lane_shares = (tl.zeros([PAGES, SLOTS], tl.float32),) * HEADS
        for first_page in range(first, stop, PAGES):
            for first_slot in range(0, HALF, SLOTS):
                early, late = score_tile(
                    *(weights + row * HEADS * R, channels + row * R, records + g * head_stride),
                    *(scoring + g * scoring_stride_g, ranges + g * ranges_stride_g, table),
                    *(first_page, first_slot, context_len, page_stride, scoring_stride_p, ranges_stride_p),
                    *(SCORING, HEADS, R, N, D, PAGES, SLOTS),
                )
                slot = first_slot + tl.arange(0, SLOTS)[None, :]
                t = (first_page + tl.arange(0, PAGES))[:, None] * N + slot
                live = (slot < HALF) & (t < context_len)
                s = tl.load(scores + t, mask=live, other=0.0)
                chosen = live & (bin_of(s, t, n_ranked, low, per_unit, PROBS) > last)
                lane_shares = add_shares(lane_shares, early, chosen, head_tops, HEADS)
                t += HALF
                live = (slot < HALF) & (t < context_len)
                s = tl.load(scores + t, mask=live, other=0.0)
                chosen = live & (bin_of(s, t, n_ranked, low, per_unit, PROBS) > last)
                lane_shares = add_shares(lane_shares, late, chosen, head_tops, HEADS)
        for h in tl.static_range(HEADS):
            at = (row * (N_SPLITS + 1) + split) * HEADS + h
            tl.store(shares + at, tl.sum(tl.sum(lane_shares[h], 1), 0))


@triton.jit
def sort_key(score, t, n_ranked):
    """uint32 that orders as the fp32 score does, both zeros alike; the local tokens are on top."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)
    return tl.where(t < n_ranked, key, 0xFFFFFFFF)


@triton.jit
def find_threshold(candidates, scores, n_candidates, n_wanted, n_ranked, TILE: tl.constexpr):
    """(key of the last candidate to read, how many candidates with that very key to read): radix select, 8 bits a pass."""
    threshold = tl.zeros([], tl.uint32)
    index = tl.arange(0, N_BINS)
    for shift in tl.static_range(24, -8, -8):
        histogram = tl.zeros([N_BINS], tl.int32)
        for first in range(0, n_candidates, TILE):
            i = first + tl.arange(0, TILE)
            t = tl.load(candidates + i, mask=i < n_candidates, other=0)
            key = sort_key(tl.load(scores + t, mask=i < n_candidates, other=0.0), t, n_ranked)
            alive = i < n_candidates
            if shift < 24:
                alive &= (key >> (shift + 8)) == (threshold >> (shift + 8))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), N_BINS, mask=alive)
        above = tl.cumsum(histogram, 0, reverse=True) - histogram
        here = (above < n_wanted) & (above + histogram >= n_wanted)
        threshold |= tl.sum(tl.where(here, index, 0), 0).to(tl.uint32) << shift
        n_wanted -= tl.sum(tl.where(here, above, 0), 0)
    return threshold, n_wanted


@triton.jit
def finish_kernel(
    records,
    scoring,
    ranges,
    block_table,
    seq_lens,
    channels,
    weights,
    scores,
    tops,
    sums,
    cells,
    candidates,
    pending,
    shares,
    page_stride,
    head_stride,
    scoring_stride_p,
    scoring_stride_g,
    ranges_stride_p,
    ranges_stride_g,
    table_stride,
    max_tokens,
    capacity,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SCORING: tl.constexpr,
    STATISTICS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * G). Touches the candidates only: 8 bytes each, and with STATISTICS 32 r for each one picked."""
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    context_len = tl.load(seq_lens + b)
    is_dense, n_read, n_local = read_counts(context_len, MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
    if is_dense:
        return
    table = block_table + b * table_stride
    cells += row * capacity
    scores += row * max_tokens
    candidates += row * max_tokens
    n_ranked = context_len - n_local
    n_cells = tl.load(pending + row * 2)
    n_candidates = tl.load(pending + row * 2 + 1)
    threshold, n_equal = find_threshold(candidates, scores, n_candidates, n_read - n_cells, n_ranked, TILE)
    seen = n_cells * 0
    if STATISTICS:
        head_tops = row_tops(tops, sums, row, N_SPLITS, HEADS)
        lane_shares = (tl.zeros([TILE], tl.float32),) * HEADS
    for first in range(0, n_candidates, TILE):
        i = first + tl.arange(0, TILE)
        live = i < n_candidates
        t = tl.load(candidates + i, mask=live, other=0)
        key = sort_key(tl.load(scores + t, mask=live, other=0.0), t, n_ranked)
        equal = live & (key == threshold)
        oldest = seen + tl.cumsum(equal.to(tl.int32), 0) <= n_equal  # candidates ascend
        chosen = (live & (key > threshold)) | (equal & oldest)
        seen += tl.sum(equal.to(tl.int32), 0)
        n_cells = append_cells(cells, n_cells, table, t, chosen, N)
        if STATISTICS:
            s = score_tokens(
                *(weights + row * HEADS * R, channels + row * R, records + g * head_stride),
                *(scoring + g * scoring_stride_g, ranges + g * ranges_stride_g, table, t, chosen, context_len),
                *(page_stride, scoring_stride_p, ranges_stride_p, SCORING, HEADS, R, N, D),
            )
            lane_shares = add_shares(lane_shares, s, chosen, head_tops, HEADS)
    if STATISTICS:
        for h in tl.static_range(HEADS):
            at = (row * (N_SPLITS + 1) + N_SPLITS) * HEADS + h
            tl.store(shares + at, tl.sum(lane_shares[h], 0))
