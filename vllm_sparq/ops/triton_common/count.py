"""How selection on a GPU counts scores: in bins that rise with the score.

Bins are linear around where a sample of the row's scores lets expect the last score to be read, the outer ones open: no
single score, however large, makes the others crowd. Probabilities have a bin an octave. Tokens that are read whatever
their rank have infinite scores.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.launch import INTERPRETED, read_counts, split_tokens, step_kernel

N_BINS = tl.constexpr(32)
"""Places of a row of counts; probabilities have so many bins."""

LINEAR_BINS = tl.constexpr(16)
"""Bins of scores: as many as two words of counters of 4 bits hold. So many leave two candidates in a hundred tokens."""

REACH = tl.constexpr(1.6)
"""Mean absolute deviations on either side that the bins divide: 1.3 standard deviations of normal scores."""

STANDS_OUT = tl.constexpr(5.0)
"""Scores of a sample that are as many of them off the mean say nothing about the others."""

LEAST_EXPONENT = tl.constexpr(100)
"""Exponent field of the probability (2^-27) that the lowest bin of ``probs`` starts at."""


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
def quantile(share):
    """What ``share`` of normal numbers lies above, within 0.003: Abramowitz and Stegun 26.2.22."""
    tail = tl.maximum(tl.minimum(share, 1.0 - share), 1e-6)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + 0.04481 * t))
    return tl.where(share < 0.5, z, -z)


@triton.jit
def bins_around(centre, reach):
    """(offset, bins per unit of score) of bins over ``centre`` +- ``reach``; if that is no range, hardly any."""
    usable = (reach > 1e-30) & (reach < 1e30) & (tl.abs(centre) < 1e30)
    per_unit = tl.where(usable, (LINEAR_BINS // 2) / tl.where(usable, reach, 1.0), 1e-30)
    return tl.where(usable, LINEAR_BINS // 2 - centre * per_unit, 0.0), per_unit


@triton.jit
def centre_of(scores, live):
    """(mean, mean absolute deviation) of the live ones of some scores [PAGES, SLOTS]."""
    n = tl.maximum(tl.sum(tl.sum(live.to(tl.float32), 1), 0), 1.0)
    centre = tl.sum(tl.sum(tl.where(live, scores, 0.0), 1), 0) / n
    return centre, tl.sum(tl.sum(tl.where(live, tl.abs(scores - centre), 0.0), 1), 0) / n


@triton.jit
def bins_of_sample(scores, live, share):
    """Bins around the score that ``share`` of some scores [PAGES, SLOTS] exceed, if those are like normal numbers."""
    live &= tl.abs(scores) < 1e30
    centre, deviation = centre_of(scores, live)
    centre, deviation = centre_of(scores, live & (tl.abs(scores - centre) <= STANDS_OUT * deviation))
    return bins_around(centre + 1.25 * deviation * quantile(share), REACH * deviation)


@triton.jit
def place_of(score, offset, per_unit, PROBS: tl.constexpr, READ: tl.constexpr):
    """fp32 that rises with the score, in fp32 arithmetic too; compared with `edges_of` a bin. Spans may have a NaN."""
    if PROBS:
        return score
    elif READ.span == 1:
        return tl.fma(score, per_unit, offset)
    else:
        return tl.where(score == score, tl.fma(score, per_unit, offset), float("inf"))


@triton.jit
def bin_of(score, offset, per_unit, PROBS: tl.constexpr, READ: tl.constexpr):
    """The bin of a score; the highest that of infinity."""
    place = place_of(score, offset, per_unit, PROBS, READ)
    if PROBS:
        index = (place.to(tl.int32, bitcast=True) >> 23) - LEAST_EXPONENT
        return tl.minimum(tl.maximum(index, 0), N_BINS - 1)
    else:
        return tl.minimum(tl.maximum(place, 0.0), LINEAR_BINS - 1.0).to(tl.int32)


@triton.jit
def edges_of(bin, PROBS: tl.constexpr):
    """The least places of a bin and of the one above it, which is NaN where nothing is above: no place reaches it."""
    if PROBS:
        low = ((bin + LEAST_EXPONENT) << 23).to(tl.float32, bitcast=True)
        high = ((bin + LEAST_EXPONENT + 1) << 23).to(tl.float32, bitcast=True)
    else:
        low, high = bin.to(tl.float32), (bin + 1).to(tl.float32)
    LAST: tl.constexpr = N_BINS - 1 if PROBS else LINEAR_BINS - 1
    return tl.where(bin == 0, float("-inf"), low), tl.where(bin == LAST, float("nan"), high)


@triton.jit
def one_at(place):
    """int32, a one that many bits to the left; 0 beyond the word, on either side."""
    if INTERPRETED:
        return tl.where((place >= 0) & (place < 32), 1 << (place & 31), 0)
    else:
        return tl.inline_asm_elementwise("shl.b32 $0, 1, $1;", "=r,r", [place], tl.int32, True, 1)


@triton.jit
def count_tile(counters, index):
    """Add bins [PAGES, SLOTS] of a tile to counters, 8 tensors int32 [PAGES, lanes] of two bins in 16 bits each.

    Bins from `LINEAR_BINS` on are not counted. Up to 8 neighbours are counted in 4 bits first, all of one thread.
    """
    SLOTS: tl.constexpr = index.shape[1]
    NEAR: tl.constexpr = min(8, SLOTS)
    place = index * 4
    result = ()
    for half in tl.static_range(2):
        ones = tl.reshape(one_at(place - 32 * half), [index.shape[0], SLOTS // NEAR, NEAR])
        nibbles = tl.sum(ones, 2)
        for shift in tl.static_range(4):
            result = result + (counters[half * 4 + shift] + ((nibbles >> (4 * shift)) & 0x000F000F),)
    return result


@triton.jit
def store_counts(counts, counters):
    """Write the sums of what `count_tile` has counted, [N_BINS]."""
    fields = ()
    for half in tl.static_range(2):
        for i in tl.static_range(8):
            fields = fields + ((counters[half * 4 + i % 4] >> (i // 4 * 16)) & 0xFFFF,)
    for width in tl.static_range(3, -1, -1):
        joined = ()
        for i in tl.static_range(2**width):
            joined = joined + (tl.join(fields[i], fields[i + 2**width]),)
        fields = joined
    lanes: tl.constexpr = counters[0].shape[0] * counters[0].shape[1]
    total = tl.sum(tl.reshape(fields[0], [lanes, LINEAR_BINS]), 0)
    tl.store(counts + tl.arange(0, LINEAR_BINS), total)
    tl.store(counts + LINEAR_BINS + tl.arange(0, N_BINS - LINEAR_BINS), tl.zeros([N_BINS - LINEAR_BINS], tl.int32))


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
def store_scores(scores, score, t, context_len, stop):
    """Store the scores of the tokens ``t`` up to ``stop``; behind the context NaN, to the end of a run of 16."""
    tl.store(scores + t, tl.where(t < context_len, score, float("nan")), mask=t < tl.cdiv(stop, 16) * 16)


@step_kernel
def count_kernel(
    positions,  # int32 [P, G, N]
    block_table,
    seq_lens,
    scores,  # fp32 [rows, max_tokens], written
    head_scores,  # fp32 [rows, HEADS, max_tokens]
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
    POSITIONS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Group scores that are sums of probabilities, known when all tokens have scores.

    Reads 4 bytes per token and head, and writes 4.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    context_len = tl.load(seq_lens + row // G)
    is_dense, _, n_local = read_counts(context_len, READ)
    if is_dense:
        return
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    row_tops, row_sums = row_statistics(tops, sums, row, N_SPLITS, HEADS)
    histogram = tl.zeros([N_BINS], tl.int32)
    start, stop = split_tokens(context_len, split, N_SPLITS, UNIT)
    for first in range(start, stop, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop
        s = tl.zeros([TILE], tl.float32)
        for h in tl.static_range(HEADS):
            own = tl.load(head_scores + h * max_tokens + t, mask=live, other=0.0)
            s += tl.exp(own - row_tops[h]) / row_sums[h]
        s = tl.where(s == s, s, 0.0)  # a NaN would be counted in a bin, and in none when bins are listed
        if POSITIONS:
            own_positions = positions + row % G * tracked_stride_g
            table = block_table + row // G * table_stride
            s = mark_newest(s, own_positions, table, t, live, n_local, context_len, tracked_stride_p, N)
        else:
            s = tl.where(t < context_len - n_local, s, float("inf"))
        store_scores(scores, s, t, context_len, stop)
        histogram += tl.histogram(bin_of(s, 0.0, 0.0, True, READ), N_BINS, mask=live)
    tl.store(counts + (row * N_SPLITS + split) * N_BINS + tl.arange(0, N_BINS), histogram)
