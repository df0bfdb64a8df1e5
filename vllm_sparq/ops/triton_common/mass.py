"""Step 3 of `sparq_decode` with a mass, on a GPU: of the k tokens picked, the first that hold it.

The tokens come as `select` lists them, in no order of rank, but of equal scores the oldest first. One program
finds the cut by radix search on the 32 bits of a score, with a sum of shares where a selection has a count, and lists
the cells of the tokens before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.count import row_statistics
from vllm_sparq.ops.triton_common.launch import read_counts, step_kernel
from vllm_sparq.ops.triton_common.select import add_shares, append_cells, sort_key, store_shares

N_DIGITS = tl.constexpr(16)
"""A pass settles 4 bits of a key. Its sums, one for each digit and token of a tile, stay in registers."""


@triton.jit
def share_of(head_scores, t, live, tops, sums, max_tokens, HEADS: tl.constexpr):
    """The mean over the heads of the probability of the tokens ``t``."""
    share = tl.zeros(t.shape, tl.float32)
    for h in tl.static_range(HEADS):
        s = tl.load(head_scores + h * max_tokens + t, mask=live, other=0.0)
        share += tl.exp(s - tops[h]) / sums[h]
    return tl.where(live, share / HEADS, 0.0)


@triton.jit
def find_cut(keys, held, n, n_least, mass, TILE: tl.constexpr):
    """Key of the last token to read, then how many with that very key still miss, and what they must hold.

    Tokens with a higher key are too few or hold too little; with the first ones of this key they do not.
    """
    threshold = tl.zeros([], tl.uint32)
    index = tl.arange(0, N_DIGITS)
    for shift in tl.static_range(28, -4, -4):
        n_above = tl.zeros([N_DIGITS], tl.int32)
        mass_above = tl.zeros([N_DIGITS], tl.float32)
        for first in range(0, n, TILE):
            i = first + tl.arange(0, TILE)
            key = tl.load(keys + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
            share = tl.load(held + i, mask=i < n, other=0.0)
            alive = i < n
            if shift < 28:
                alive &= (key >> (shift + 4)) == (threshold >> (shift + 4))
            digit = ((key >> shift) & (N_DIGITS - 1)).to(tl.int32)
            higher = alive[:, None] & (digit[:, None] > index[None, :])
            n_above += tl.sum(higher.to(tl.int32), 0)
            mass_above += tl.sum(tl.where(higher, share[:, None], 0.0), 0)
        enough = (n_above >= n_least) & (mass_above >= mass)
        last = tl.sum(enough.to(tl.int32), 0)  # above the highest digit there is nothing, so it is never enough
        threshold |= last.to(tl.uint32) << shift
        n_least -= tl.sum(tl.where(index == last, n_above, 0), 0)
        mass -= tl.sum(tl.where(index == last, mass_above, 0.0), 0)
    return threshold, n_least, mass


@step_kernel
def cut_kernel(
    block_table,
    seq_lens,
    scores,
    head_scores,
    tops,
    sums,
    tokens,  # int32 [rows, list_stride], what `select` listed
    keys,  # int32 [rows, capacity], scratch
    held,  # fp32 [rows, capacity], scratch
    cells,  # int32 [rows, capacity], written: cells of tokens to read
    n_cells,  # int32 [rows], written: how many
    shares,  # fp32 [rows, N_SPLITS + 1, HEADS], written with STATISTICS: exponentials of these tokens, and zeros
    sinks,  # fp32 [H], with SINKS: what they hold is read anyhow
    table_stride,
    max_tokens,
    list_stride,  # of tokens
    capacity,  # of the other lists
    mass,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    STAGED: tl.constexpr,
    STATISTICS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST_K: tl.constexpr,
    SINKS: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G). Gathers 4 bytes of group score and those of the head scores per picked token, then ten passes over
    8 bytes, from L1 mostly. Rows that are read densely keep all their tokens."""
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(seq_lens + row // G)
    is_dense, n_read, n_local = read_counts(context_len, READ)
    table = block_table + row // G * table_stride
    tokens += row * list_stride
    cells += row * capacity
    n = n_read * 0
    if is_dense:
        for first in range(0, n_read, TILE):
            i = first + tl.arange(0, TILE)
            t = tl.load(tokens + i, mask=i < n_read, other=0)
            n = append_cells(cells, n, table, t, i < n_read, context_len, N, STAGED, READ)
        tl.store(n_cells + row, n)
        return

    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    keys += row * capacity
    held += row * capacity
    row_tops, row_sums = row_statistics(tops, sums, row, N_SPLITS, HEADS)
    for first in range(0, n_read, TILE):
        i = first + tl.arange(0, TILE)
        live = i < n_read
        t = tl.load(tokens + i, mask=live, other=0)
        key = sort_key(tl.load(scores + t, mask=live, other=0.0))
        tl.store(keys + i, key.to(tl.int32, bitcast=True), mask=live)
        tl.store(held + i, share_of(head_scores, t, live, row_tops, row_sums, max_tokens, HEADS), mask=live)
    tl.debug_barrier()  # what one thread stored others load

    if SINKS:
        for h in tl.static_range(HEADS):
            mass -= tl.exp(tl.load(sinks + row % G * HEADS + h) - row_tops[h]) / row_sums[h] / HEADS
    n_least = tl.maximum(n_local, tl.minimum(n_read, LEAST_K + 1))
    threshold, n_missing, mass_missing = find_cut(keys, held, n_read, n_least, mass, TILE)
    n_equal = n_read * 0
    equal_held = mass * 0.0
    if STATISTICS:
        lane_shares = (tl.zeros([TILE], tl.float32),) * HEADS
    for first in range(0, n_read, TILE):
        i = first + tl.arange(0, TILE)
        live = i < n_read
        t = tl.load(tokens + i, mask=live, other=0)
        key = tl.load(keys + i, mask=live, other=0).to(tl.uint32, bitcast=True)
        equal = live & (key == threshold)
        share = tl.where(equal, tl.load(held + i, mask=live, other=0.0), 0.0)
        n_before = n_equal + tl.cumsum(equal.to(tl.int32), 0) - 1
        held_before = equal_held + tl.cumsum(share, 0) - share
        chosen = (live & (key > threshold)) | (equal & ((n_before < n_missing) | (held_before < mass_missing)))
        n_equal += tl.sum(equal.to(tl.int32), 0)
        equal_held += tl.sum(share, 0)
        n = append_cells(cells, n, table, t, chosen, context_len, N, STAGED, READ)
        if STATISTICS:
            lane_shares = add_shares(lane_shares, head_scores, t, chosen, row_tops, max_tokens, HEADS)
    tl.store(n_cells + row, n)
    if STATISTICS:
        own = shares + row * (N_SPLITS + 1) * HEADS
        for split in range(N_SPLITS):
            for h in tl.static_range(HEADS):
                tl.store(own + split * HEADS + h, 0.0)
        store_shares(own + N_SPLITS * HEADS, lane_shares, HEADS)
