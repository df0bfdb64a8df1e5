"""Step 3 of `sparq_decode` and of `quest_decode` on a GPU: the exact top k of each row, no sort, one launch.

While tokens are scored they are counted in bins that rise with the score. Each program of `partition_kernel` finds in
the counts the bin of the k-th score. Everything above is picked; the bin itself, two tokens in a hundred, is the
list of candidates. All positions follow from the counts: one result, whatever the order of the programs. The last
program of a row to arrive picks the rest from the candidates by radix select on the 32 bits of a score, ties to the
oldest.

Where so many tokens fall into the last bin that the list cannot hold them, they are mostly equal, as with keys that are
all alike: then the oldest are picked at no more cost than others; else the program that finishes goes over the row
instead of the list.

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
from vllm_sparq.ops.triton_common.count import N_BINS, edges_of, items_of, place_of, row_statistics
from vllm_sparq.ops.triton_common.launch import is_last_to_arrive, read_counts, split_tokens, step_kernel

N_DIGITS = tl.constexpr(256)
"""A pass over the candidates settles 8 bits of a score."""

FINISH_TILE = tl.constexpr(1024)
"""Candidates of one step, where each is a token; of spans, which are listed token by token, an eighth."""


@triton.jit
def put_cells(cells, place, table, t, chosen, context_len, N: tl.constexpr, STAGED: tl.constexpr, READ: tl.constexpr):
    """Write the cells of the chosen items of a tile to their places in a list of items."""
    if READ.span > 1:
        within = tl.arange(0, READ.span)[None, :]
        t = t[:, None] * READ.span + within
        place = place[:, None] * READ.span + within
        chosen = chosen[:, None] & (t < context_len)
    tl.store(cells + place, cell_of(table, t, chosen, context_len, N, STAGED), mask=chosen)


@triton.jit
def append_cells(cells, n, table, t, chosen, context_len, N: tl.constexpr, STAGED: tl.constexpr, READ: tl.constexpr):
    """Append the cells of the chosen items of a tile to a list of ``n`` items; returns its new length."""
    place = n + tl.cumsum(chosen.to(tl.int32), 0) - 1
    put_cells(cells, place, table, t, chosen, context_len, N, STAGED, READ)
    return n + tl.sum(chosen.to(tl.int32), 0)


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
        s = tl.load(head_scores + h * max_tokens + t, mask=chosen, other=0.0)
        result = result + (shares[h] + tl.where(chosen, tl.exp(s - tops[h]), 0.0),)
    return result


@triton.jit
def store_shares(shares, lane_shares, HEADS: tl.constexpr):
    """[HEADS] sums over the lanes."""
    for h in tl.static_range(HEADS):
        tl.store(shares + h, tl.sum(lane_shares[h], 0))


@triton.jit
def sort_key(score):
    """uint32 that orders as the fp32 score does, both zeros alike; a positive NaN is above infinity."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def load_candidates(candidates, scores, i, n, listed, n_items, bins, PROBS: tl.constexpr, READ: tl.constexpr):
    """(token, key, live) of the candidates ``i``: of the list, or those tokens ``i`` of the row that are in the bin.

    Whatever the list holds, a token is one of the row: a list that a bin's count belies spoils one answer, not all.
    """
    offset, per_unit, low, high = bins
    t = i
    if listed:
        t = tl.minimum(tl.maximum(tl.load(candidates + i, mask=i < n, other=0), 0), n_items - 1)
    score = tl.load(scores + t, mask=i < n, other=0.0)
    place = place_of(score, offset, per_unit, PROBS, READ)
    return t, sort_key(score), (i < n) & (place >= low) & ((place >= high) == 0)


@triton.jit
def find_threshold(candidates, scores, n, listed, n_items, bins, n_wanted, PROBS: tl.constexpr, READ: tl.constexpr):
    """Key of the last candidate to read, and how many with that very key to read: radix select, 8 bits a pass."""
    STEP: tl.constexpr = FINISH_TILE if READ.span == 1 else FINISH_TILE // 8
    threshold = tl.zeros([], tl.uint32)
    index = tl.arange(0, N_DIGITS)
    for shift in tl.static_range(24, -8, -8):
        histogram = tl.zeros([N_DIGITS], tl.int32)
        for first in range(0, n, STEP):
            i = first + tl.arange(0, STEP)
            _, key, alive = load_candidates(candidates, scores, i, n, listed, n_items, bins, PROBS, READ)
            if shift < 24:
                alive &= (key >> (shift + 8)) == (threshold >> (shift + 8))
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), N_DIGITS, mask=alive)
        above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        here = (above < n_wanted) & (above + histogram >= n_wanted)
        threshold |= tl.sum(tl.where(here, index, 0), 0).to(tl.uint32) << shift
        n_wanted -= tl.sum(tl.where(here, above, 0), 0)
    return threshold, n_wanted


@triton.jit
def finish(
    table,
    scores,  # this and the next five point to the row
    head_scores,
    cells,
    candidates,
    extents,
    shares,
    bins,
    n_cells,
    n_candidates,
    n_wanted,
    n_items,
    context_len,
    row_tops,
    max_tokens,
    max_candidates,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PROBS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    READ: tl.constexpr,
):
    """Pick ``n_wanted`` of the candidates: five passes over 8 bytes each, all but the first from L1."""
    STEP: tl.constexpr = FINISH_TILE if READ.span == 1 else FINISH_TILE // 8
    listed, n, n_equal = n_candidates <= max_candidates, n_candidates, n_wanted
    threshold = tl.zeros([], tl.uint32)
    alike = n_candidates < 0
    if not listed:
        each = tl.arange(0, N_SPLITS)
        least = tl.min(tl.load(extents + each * 2).to(tl.uint32, bitcast=True), 0)
        alike = least == tl.max(tl.load(extents + each * 2 + 1).to(tl.uint32, bitcast=True), 0)
        listed, n = alike, tl.where(alike, n_wanted, n_items)
        threshold = least
    if not alike:
        threshold, n_equal = find_threshold(candidates, scores, n, listed, n_items, bins, n_wanted, PROBS, READ)
    seen = n_cells * 0
    if STATISTICS:
        lane_shares = (tl.zeros([STEP], tl.float32),) * HEADS
    for first in range(0, n, STEP):
        i = first + tl.arange(0, STEP)
        t, key, live = load_candidates(candidates, scores, i, n, listed, n_items, bins, PROBS, READ)
        equal = live & (key == threshold)
        oldest = seen + tl.cumsum(equal.to(tl.int32), 0) <= n_equal  # candidates ascend
        chosen = (live & (key > threshold)) | (equal & oldest)
        seen += tl.sum(equal.to(tl.int32), 0)
        n_cells = append_cells(cells, n_cells, table, t, chosen, context_len, N, STAGED, READ)
        if STATISTICS:
            lane_shares = add_shares(lane_shares, head_scores, t, chosen, row_tops, max_tokens, HEADS)
    if STATISTICS:
        store_shares(shares + N_SPLITS * HEADS, lane_shares, HEADS)
    if READ.span > 1:
        newest = n_items + tl.zeros([1], tl.int32)
        append_cells(cells, n_cells, table, newest, newest == newest, context_len, N, STAGED, READ)


@triton.jit
def settle_cells(
    cells,
    first,
    stop,
    table,
    head_scores,
    shares,
    row_tops,
    context_len,
    max_tokens,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Turn the tokens that the program has put in the places ``first : stop`` of a list into their cells."""
    tl.debug_barrier()  # other threads wrote them
    if STATISTICS:
        lane_shares = (tl.zeros([TILE], tl.float32),) * HEADS
    for start in range(first, stop, TILE):
        i = start + tl.arange(0, TILE)
        t = tl.load(cells + i, mask=i < stop, other=0)
        if STATISTICS:
            lane_shares = add_shares(lane_shares, head_scores, t, i < stop, row_tops, max_tokens, HEADS)
        tl.store(cells + i, cell_of(table, t, i < stop, context_len, N, STAGED), mask=i < stop)
    if STATISTICS:
        store_shares(shares, lane_shares, HEADS)


@step_kernel
def partition_kernel(
    block_table,
    seq_lens,
    scores,
    head_scores,
    bins,  # fp32 [rows, 2], see `bins_around`
    tops,
    sums,
    counts,
    arrivals,  # int32 [rows, 2], zeros; the first counts programs of this launch
    lists,  # int32 [rows, list_stride], written: the cells to read, and from ``capacity`` on the first of the last
    # bin's tokens, ascending
    extents,  # int32 [rows, N_SPLITS, 2], written where a list is too short: least and largest key of each split's
    shares,  # fp32 [rows, N_SPLITS + 1, HEADS], written with STATISTICS: exponentials of the tokens listed
    table_stride,
    max_tokens,
    capacity,
    list_stride,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PROBS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    UNIT: tl.constexpr,  # tokens, or spans, of which a split takes whole ones: as where they were counted
    TILE: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 4 bytes per token; STATISTICS 32 more per query head and token picked."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    context_len = tl.load(seq_lens + row // G)
    is_dense, n_read, _ = read_counts(context_len, READ)
    table = block_table + row // G * table_stride
    lists += row * list_stride
    if is_dense:
        start, stop = split_tokens(context_len, split, N_SPLITS, TILE)
        for first in range(start, stop, TILE):
            t = first + tl.arange(0, TILE)
            tl.store(lists + t, cell_of(table, t, t < stop, context_len, N, STAGED), mask=t < stop)
        return

    n_items, n_wanted = items_of(context_len, n_read, READ)
    start, stop = split_tokens(n_items, split, N_SPLITS, UNIT)
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    extents += row * N_SPLITS * 2
    shares += row * (N_SPLITS + 1) * HEADS
    max_candidates = list_stride - capacity - 1  # the last place is for those that find none
    offset, per_unit = 0.0, 0.0
    if not PROBS:
        offset, per_unit = tl.load(bins + row * 2), tl.load(bins + row * 2 + 1)
    last, n_above, n_in, n_cells, n_candidates = find_bin(counts, row, split, n_wanted, N_SPLITS, min(N_SPLITS, 32))
    low, high = edges_of(last, PROBS)
    crowded = n_in > max_candidates
    least = tl.full([], 0xFFFFFFFF, tl.uint32)
    most = tl.zeros([], tl.uint32)
    first_cell = n_cells
    for first in range(start, stop, TILE):
        t = first + tl.arange(0, TILE)
        if READ.span == 1:  # whole runs of 16, so that loads are wide: behind the newest token are NaN, in no bin
            s = tl.load(scores + t, mask=t < tl.cdiv(stop, 16) * 16, other=float("nan"))
            place = place_of(s, offset, per_unit, PROBS, READ)
            chosen, listed = place >= high, place >= low
        else:
            s = tl.load(scores + t, mask=t < stop, other=0.0)
            place = place_of(s, offset, per_unit, PROBS, READ)
            chosen, listed = (place >= high) & (t < stop), (place >= low) & (t < stop)
        # One running sum for two lists: of those above the bin, and of those in it.
        zero = tl.zeros([TILE], tl.int32)
        both = tl.where(chosen, zero + 1, tl.where(listed, zero + 65536, zero))
        before = tl.cumsum(both, 0)
        to_cells = n_cells - 1 + (before & 65535)
        to_candidates = capacity + tl.minimum(n_candidates - 1 + (before >> 16), max_candidates)
        if READ.span == 1:
            tl.store(lists + tl.where(chosen, to_cells, to_candidates), t, mask=listed)
        else:
            put_cells(lists, to_cells, table, t, chosen, context_len, N, STAGED, READ)
            tl.store(lists + to_candidates, t, mask=listed & (chosen == 0))
        total = tl.sum(both, 0)
        n_cells += total & 65535
        n_candidates += total >> 16
        if crowded:
            key, waiting = sort_key(s), listed & (chosen == 0)
            least = tl.minimum(least, tl.min(tl.where(waiting, key, 0xFFFFFFFF), 0))
            most = tl.maximum(most, tl.max(tl.where(waiting, key, 0), 0))
    row_tops = ()
    if STATISTICS:
        row_tops, _ = row_statistics(tops, sums, row, N_SPLITS, HEADS)
    if READ.span == 1:
        settle_cells(
            *(lists, first_cell, n_cells, table, head_scores, shares + split * HEADS, row_tops, context_len),
            *(max_tokens, HEADS, N, STAGED, STATISTICS, 512),
        )
    if crowded:
        tl.store(extents + split * 2, least.to(tl.int32, bitcast=True))
        tl.store(extents + split * 2 + 1, most.to(tl.int32, bitcast=True))
    if is_last_to_arrive(arrivals + row * 2, N_SPLITS):
        finish(
            *(table, scores, head_scores, lists, lists + capacity, extents, shares, (offset, per_unit, low, high)),
            *(n_above, n_in, n_wanted - n_above, n_items, context_len, row_tops, max_tokens, max_candidates),
            *(HEADS, N, STAGED, STATISTICS, PROBS, N_SPLITS, READ),
        )
