"""Steps 1 and 2 of `sparq_decode` on a GPU: pick channels, score every token from them, count what selection needs.

`score_tile` says how a tile of tokens is scored. Every program of a row first scores the same sample of its tokens, and
so all of them count in the same bins.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.count import (
    LINEAR_BINS,
    N_BINS,
    bin_of,
    bins_of_sample,
    count_tile,
    mark_newest,
    store_counts,
    store_scores,
)
from vllm_sparq.ops.triton_common.launch import read_counts, soft_capped, split_tokens, step_kernel
from vllm_sparq.ops.triton_common.score_tile import full_pages, score_tile


@triton.jit
def group_weight(query, d, query_stride_h, GROUP: tl.constexpr, D: tl.constexpr):
    """fp32 sum of |q| over the group for channels d, -1 beyond D; head by head, so the same bits for any shape of d."""
    total = tl.zeros(d.shape, tl.float32)
    for h in tl.static_range(GROUP):
        q = tl.load(query + h * query_stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.abs(q)
    total = tl.where(total == total, total, 0.0)  # a NaN would break the order, and with it the list of channels
    return tl.where(d < D, total, -1.0)


@triton.jit
def pick_channels(
    query,  # pointer to the group's first head
    channels,  # int32 [R], written
    weights,  # fp32 [HEADS, R], written: q times temperature; summed over the group where HEADS is 1
    query_stride_h,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Step 1. A channel's place is the number of channels before it: D^2 comparisons in all, no sort, ties exact."""
    d = tl.arange(0, D_PAD)
    own = group_weight(query, d, query_stride_h, GROUP, D)
    before = tl.zeros([D_PAD, 16], tl.int32)
    for first in range(0, D, 16):  # D is a multiple of 16
        other = first + tl.arange(0, 16)
        theirs = group_weight(query, other, query_stride_h, GROUP, D)
        tied = (theirs[None, :] == own[:, None]) & (other[None, :] < d[:, None])
        before += ((theirs[None, :] > own[:, None]) | tied).to(tl.int32)
    place = tl.sum(before, 1)
    picked = (place < R) & (d < D)
    tl.store(channels + place, d, mask=picked)
    total = tl.zeros([D_PAD], tl.float32)
    for h in tl.static_range(GROUP):
        q = tl.load(query + h * query_stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        size = tl.sum(tl.abs(q), 0)
        covered = tl.sum(tl.where(picked, tl.abs(q), 0.0), 0)
        # The scores of a head without weight in the channels are zero, whatever the temperature.
        temperature = tl.where(covered > 0.0, scale * tl.sqrt_rn(tl.div_rn(size, covered)), scale)
        if HEADS == 1:
            total += q * temperature
        else:
            tl.store(weights + h * R + place, q * temperature, mask=picked)
    if HEADS == 1:
        tl.store(weights + place, total, mask=picked)


@triton.jit
def scores_of_run(scores, r: tl.constexpr, HEADS: tl.constexpr):
    """The scores of all heads in one run."""
    result = ()
    for h in tl.static_range(HEADS):
        result = result + (scores[r * HEADS + h],)
    return result


@triton.jit
def cap_heads(scores, HEADS: tl.constexpr, CAP: tl.constexpr):
    """The scores of a tuple as probabilities are made of them."""
    result = ()
    for h in tl.static_range(HEADS):
        result = result + (soft_capped(scores[h], CAP),)
    return result


@triton.jit
def sum_heads(scores, HEADS: tl.constexpr):
    """The sum over the heads of a tuple."""
    total = scores[0]
    for h in tl.static_range(1, HEADS):
        total += scores[h]
    return total


@triton.jit
def store_heads(head_scores, scores, t, live, max_tokens, HEADS: tl.constexpr):
    """Keep the scores of each head, exactly: sums of exponentials are made of what these are."""
    for h in tl.static_range(HEADS):
        tl.store(head_scores + h * max_tokens + t, scores[h], mask=live)


@triton.jit
def mean_value(
    records,  # pointer to this head's first value: keys + D
    value_sum,
    table,
    mean,  # fp32 [D], written
    context_len,
    page_stride,
    sum_stride_p,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Step 5: the mean of V over the request, from the last page's sum and its rows."""
    d = tl.arange(0, D_PAD)
    last = (context_len - 1) // N
    page = tl.load(table + last).to(tl.int64)
    rows = tl.zeros([TILE, D_PAD], tl.float32)
    for first in range(0, context_len - last * N, TILE):
        slot = first + tl.arange(0, TILE)
        live = slot < context_len - last * N
        mask = live[:, None] & (d < D)[None, :]
        if STAGED == 0:
            at = records + page * page_stride + slot[:, None] * (2 * D) + d[None, :]
        else:
            ahead = tl.load(table + last + 1 + slot // STAGED, mask=live, other=0).to(tl.int64)
            at = records + (ahead * page_stride + slot % STAGED * (2 * D))[:, None] + d[None, :]
        rows += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(value_sum + page * sum_stride_p + d, mask=d < D, other=0.0)
    tl.store(mean + d, (before + tl.sum(rows, 0)) / context_len.to(tl.float32), mask=d < D)


@triton.jit
def note_extremes(tops, sums, scores, live, HEADS: tl.constexpr):
    """Running maximum and sum of exponentials of each lane and head; dead lanes add nothing."""
    new_tops = ()
    new_sums = ()
    for h in tl.static_range(HEADS):
        s = tl.where(live, scores[h], float("-inf"))
        top = tl.maximum(tops[h], s)
        new_tops = new_tops + (top,)
        new_sums = new_sums + (sums[h] * tl.exp(tops[h] - top) + tl.exp(s - top),)
    return new_tops, new_sums


@step_kernel
def score_kernel(
    query,  # [B, H, D]
    records,  # the parts of the pages, [P, G, ...]
    ranking,
    scales,
    value_sum,
    positions,
    block_table,
    seq_lens,
    channels,  # int32 [rows, R], written: every split of a row writes the same
    weights,  # fp32 [rows, HEADS, R], written alike
    scores,  # fp32 [rows, max_tokens], written: summed over the group; infinite for the newest, which are read anyhow
    bins,  # fp32 [rows, 2], written alike by every split, unless PROBS
    counts,  # int32 [rows, N_SPLITS, N_BINS], written unless PROBS
    arrivals,  # int32 [rows, 2], set to zero for the launches that follow
    tops,  # fp32 [rows, N_SPLITS, HEADS], written with STATISTICS: largest score of each head,
    sums,  # and its sum of exponentials below that
    head_scores,  # fp32 [rows, HEADS, max_tokens], written with KEEP
    mean,  # fp32 [rows, D], written with MEAN
    sinks,  # fp32 [H], with SINKS: one more score of each head, of the first split
    query_stride_b,
    query_stride_h,
    page_stride,
    head_stride,
    ranking_stride_p,
    ranking_stride_g,
    scales_stride_p,
    scales_stride_g,
    sum_stride_p,
    sum_stride_g,
    tracked_stride_p,
    tracked_stride_g,
    table_stride,
    max_tokens,
    scale,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    RANKING: tl.constexpr,  # None: channel-major K itself
    FORMAT: tl.constexpr,
    STATISTICS: tl.constexpr,
    KEEP: tl.constexpr,
    PROBS: tl.constexpr,
    POSITIONS: tl.constexpr,
    MEAN: tl.constexpr,
    SINKS: tl.constexpr,
    CAP: tl.constexpr,  # of the scores of heads; 0: none
    N_SPLITS: tl.constexpr,
    RUNS: tl.constexpr,  # a tile takes the slots n, n + N / RUNS, .. of its pages
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS, and one more with MEAN).

    Per token r / 2 bytes of codes (kivi2: r / 4), 4 r / N of scales (channel-major K: 4 r / g), and 4 of score.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, g = row // G, row % G
    tl.store(arrivals + row * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))
    context_len = tl.load(seq_lens + b)
    is_dense, n_read, n_local = read_counts(context_len, READ)
    if is_dense:
        return
    records += g * head_stride
    table = block_table + b * table_stride
    if MEAN:  # noqa: SIM102  known at compile time, the rest is not
        if split == N_SPLITS:
            value_sum += g * sum_stride_g
            mean += row * D
            STAGED: tl.constexpr = 0 if FORMAT is None else FORMAT.staged
            mean_value(
                *(records + D, value_sum, table, mean, context_len, page_stride, sum_stride_p),
                *(N, D, D_PAD, 16, STAGED),
            )
            return
    query += b * query_stride_b + g * GROUP * query_stride_h
    channels += row * R
    weights += row * HEADS * R
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    pick_channels(query, channels, weights, query_stride_h, scale, HEADS, GROUP, R, D, D_PAD)
    tl.debug_barrier()  # the loop reads what other threads wrote

    RUN: tl.constexpr = N // RUNS
    HOISTED: tl.constexpr = HEADS == 1 and R <= CHANNELS and (RANKING == "int4" or RANKING is None)
    if HOISTED:
        own_channels = ()
        own_weights = ()
        for i in tl.static_range(CHANNELS):
            own_channels = own_channels + (tl.load(channels + i, mask=i < R, other=0),)
            own_weights = own_weights + (tl.load(weights + i, mask=i < R, other=0.0),)
        held = own_weights, own_channels
    else:
        held = weights, channels
    n_ranked = context_len - n_local
    positions += g * tracked_stride_g
    ranking += g * ranking_stride_g
    scales += g * scales_stride_g
    if not PROBS:
        SAMPLE: tl.constexpr = max(1, SLOTS // 4)
        n_full = full_pages(context_len, N, FORMAT)
        sample = score_tile(
            *(weights, channels, held, records, ranking, scales, table, tl.arange(0, PAGES) * n_full // PAGES),
            *(0, context_len, page_stride, ranking_stride_p, scales_stride_p),
            *(RANKING, FORMAT, HEADS, R, N, D, RUNS, PAGES, SAMPLE, CHANNELS, HOISTED, False),
        )
        n_sampled = tl.minimum(RUN, SAMPLE)
        if n_full == 0:
            n_sampled = tl.minimum(n_sampled, context_len)
        sampled = (tl.arange(0, SAMPLE) < n_sampled)[None, :] & (tl.arange(0, PAGES) >= 0)[:, None]
        share = (n_read - n_local).to(tl.float32) / tl.maximum(n_ranked, 1).to(tl.float32)
        offset, per_unit = bins_of_sample(sum_heads(sample, HEADS), sampled, share)
        tl.store(bins + row * 2, offset)
        tl.store(bins + row * 2 + 1, per_unit)
        counters = (tl.zeros([PAGES, max(1, SLOTS // 8)], tl.int32),) * 8
    lane_tops = (tl.full([PAGES, SLOTS], -1e30, tl.float32),) * HEADS  # finite: a lane may never see a token
    lane_sums = (tl.zeros([PAGES, SLOTS], tl.float32),) * HEADS
    first, stop = split_tokens(tl.cdiv(context_len, N), split, N_SPLITS, PAGES)
    # Tiles of full pages whose tokens are all ranked need no masks; the others come after them.
    PLAIN: tl.constexpr = not (STATISTICS or POSITIONS or PROBS) and RUN % SLOTS == 0
    n_plain = tl.maximum(tl.minimum(tl.minimum(n_ranked // N, full_pages(context_len, N, FORMAT)), stop) - first, 0)
    stop_plain = first + n_plain // PAGES * PAGES if PLAIN else first
    for turn in tl.static_range(0 if PLAIN else 1, 2):
        for first_page in range(first if turn == 0 else stop_plain, stop_plain if turn == 0 else stop, PAGES):
            for first_slot in range(0, RUN, SLOTS):
                tile = score_tile(
                    *(weights, channels, held, records, ranking, scales, table, first_page + tl.arange(0, PAGES)),
                    *(first_slot, context_len, page_stride, ranking_stride_p, scales_stride_p),
                    *(RANKING, FORMAT, HEADS, R, N, D, RUNS, PAGES, SLOTS, CHANNELS, HOISTED, turn == 0),
                )
                slot = first_slot + tl.arange(0, SLOTS)[None, :]
                first_token = (first_page + tl.arange(0, PAGES))[:, None] * N
                for r in tl.static_range(RUNS):
                    own = scores_of_run(tile, r, HEADS)
                    t = first_token + (slot + r * RUN)
                    live = (slot < RUN) & (t < context_len)
                    if STATISTICS:
                        of_heads = cap_heads(own, HEADS, CAP)
                        lane_tops, lane_sums = note_extremes(lane_tops, lane_sums, of_heads, live, HEADS)
                    if KEEP:
                        store_heads(head_scores, cap_heads(own, HEADS, CAP), t, live, max_tokens, HEADS)
                    if not PROBS:
                        s = tl.maximum(sum_heads(own, HEADS), -3.4028234663852886e38)  # a NaN would be in no bin
                        if turn == 0:
                            tl.store(scores + t, s)
                            counters = count_tile(counters, bin_of(s, offset, per_unit, False, READ))
                        else:
                            if POSITIONS:
                                s = mark_newest(s, positions, table, t, live, n_local, context_len, tracked_stride_p, N)
                            else:
                                s = tl.where(t < n_ranked, s, float("inf"))
                            if RUN % SLOTS == 0:
                                store_scores(scores, s, t, context_len, context_len)
                            else:
                                store_scores(scores, s, t, context_len, tl.where(slot < RUN, context_len, 0))
                            index = bin_of(s, offset, per_unit, False, READ)
                            counters = count_tile(counters, tl.where(live, index, LINEAR_BINS))

    at = row * N_SPLITS + split
    if not PROBS:
        store_counts(counts + at * N_BINS, counters)
    if STATISTICS:
        for h in tl.static_range(HEADS):
            top = tl.max(tl.max(lane_tops[h], 1), 0)
            total = tl.sum(tl.sum(lane_sums[h] * tl.exp(lane_tops[h] - top), 1), 0)
            if SINKS:
                sink = tl.where(split == 0, tl.load(sinks + g * GROUP + h), float("-inf"))
                of_tokens = top
                top = tl.maximum(top, sink)
                total = total * tl.exp(of_tokens - top) + tl.exp(sink - top)
            tl.store(tops + at * HEADS + h, top)
            tl.store(sums + at * HEADS + h, total)
