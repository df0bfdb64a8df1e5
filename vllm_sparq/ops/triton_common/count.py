"""How selection on a GPU counts scores: in bins that rise with the score.

Bins are linear over what a sample of the row's scores leads to expect, the outer ones open: no single score, however
large, makes the others crowd. Probabilities have bins of half an octave.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.launch import read_counts, split_tokens

N_BINS = tl.constexpr(64)
"""Counting costs instructions per bin. So many leave one or two candidates in a hundred tokens."""

REACH = tl.constexpr(5.0)
"""Mean absolute deviations from the mean at which the open bins begin: four standard deviations of normal scores."""

LEAST_EXPONENT = tl.constexpr(100)
"""Exponent field of the probability (2^-27) that the lowest bin of ``probs`` starts at; 2 bins to the octave."""


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
def bins_around(centre, reach):
    """(offset, bins per unit of score) of bins over ``centre`` +- ``reach``; all scores in one if that is no range."""
    usable = (reach > 1e-30) & (reach < 1e30) & (tl.abs(centre) < 1e30)
    per_unit = tl.where(usable, (N_BINS // 2) / tl.where(usable, reach, 1.0), 0.0)
    return tl.where(usable, N_BINS // 2 - centre * per_unit, 0.0), per_unit


@triton.jit
def centre_of(scores, live):
    """(mean, mean absolute deviation) of the live ones of some scores [PAGES, SLOTS]."""
    n = tl.maximum(tl.sum(tl.sum(live.to(tl.float32), 1), 0), 1.0)
    centre = tl.sum(tl.sum(tl.where(live, scores, 0.0), 1), 0) / n
    return centre, tl.sum(tl.sum(tl.where(live, tl.abs(scores - centre), 0.0), 1), 0) / n


@triton.jit
def bins_of_sample(scores, live):
    """`bins_around` the mean of some scores [PAGES, SLOTS], but for those that stand out or are not finite."""
    live &= tl.abs(scores) < 1e30
    centre, deviation = centre_of(scores, live)
    centre, deviation = centre_of(scores, live & (tl.abs(scores - centre) <= REACH * deviation))
    return bins_around(centre, REACH * deviation)


@triton.jit
def bin_of(score, t, n_ranked, offset, per_unit, PROBS: tl.constexpr, POSITIONS: tl.constexpr):
    """Monotonic in the score, in fp32 arithmetic too; the local tokens are on top, and a NaN."""
    if PROBS:
        index = (score.to(tl.int32, bitcast=True) >> 22) - LEAST_EXPONENT * 2
        index = tl.minimum(tl.maximum(index, 0), N_BINS - 1)
    else:
        place = tl.fma(score, per_unit, offset)
        place = tl.minimum(tl.maximum(place, 0.0), N_BINS - 1.0)
        index = tl.where(score != score, N_BINS - 1.0, place).to(tl.int32)
    return tl.where(is_ranked(score, t, n_ranked, POSITIONS), index, N_BINS - 1)


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
    scores,  # fp32 [rows, max_tokens], written
    head_scores,  # [rows, HEADS, max_tokens]
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
            own = tl.load(head_scores + h * max_tokens + t, mask=live, other=0.0).to(tl.float32)
            s += tl.exp(own - row_tops[h]) / row_sums[h]
        if POSITIONS:
            own_positions = positions + row % G * tracked_stride_g
            table = block_table + row // G * table_stride
            s = mark_newest(s, own_positions, table, t, live, n_local, context_len, tracked_stride_p, N)
        tl.store(scores + t, s, mask=live)
        index = bin_of(s, t, context_len - n_local, 0.0, 0.0, True, POSITIONS)
        histogram += tl.histogram(index, N_BINS, mask=live)
    tl.store(counts + (row * N_SPLITS + split) * N_BINS + tl.arange(0, N_BINS), histogram)
