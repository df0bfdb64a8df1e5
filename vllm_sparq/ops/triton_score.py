"""Steps 1 and 2 of `sparq_decode` on a GPU: pick channels, score every token from them, note what selection needs.

Scores run on plain fp32 units: with ``r`` channels a token costs ``r`` unpacked codes for the whole query group, less
than its bytes take to arrive, and tensor cores would want the codes turned around in shared memory first. Each thread
owns tokens and walks the channels, so nothing is reduced across threads.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common import cast, read_counts, split_tokens


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
def add_channel(scores, weights, c, keys, HEADS: tl.constexpr, R: tl.constexpr):
    """``scores[h] + weights[h, c] * keys`` for every head."""
    result = ()
    for h in tl.static_range(HEADS):
        weight = tl.load(weights + h * R + c, mask=c < R, other=0.0)
        result = result + (scores[h] + weight * keys,)
    return result


@triton.jit
def score_full_pages(
    early,  # tuples with fp32 [PAGES, SLOTS] per head: slots n, and slots n + N/2
    late,
    weights,
    channels,
    scoring,  # pointers to each page's codes, [PAGES, SLOTS]
    ranges,  # pointers to each page's ranges, [PAGES]
    full,
    mask,
    SCORING: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the scores from the scoring copy, where ``mask``; the loads of several channels leave before any is used."""
    HALF: tl.constexpr = N // 2
    WIDTH: tl.constexpr = HALF if SCORING == "int4" else N
    for first in range(0, R, CHANNELS):
        codes = ()
        codes_late = ()
        scales = ()
        for i in tl.static_range(CHANNELS):
            channel = tl.load(channels + first + i, mask=first + i < R, other=0)
            codes = codes + (tl.load(scoring + channel * WIDTH, mask=mask, other=0),)
            if SCORING != "int4":
                codes_late = codes_late + (tl.load(scoring + channel * WIDTH + HALF, mask=mask, other=0),)
            if SCORING != "model":
                scales = scales + (tl.load(ranges + channel, mask=full, other=0),)
        for i in tl.static_range(CHANNELS):
            if SCORING == "int4":
                k_early = (codes[i] & 15).to(tl.float32)
                k_late = (codes[i] >> 4).to(tl.float32)
            else:
                k_early = codes[i].to(tl.float32)
                k_late = codes_late[i].to(tl.float32)
            if SCORING != "model":
                step = scales[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
                zero = (scales[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
                k_early = zero + step * k_early
                k_late = zero + step * k_late
            early = add_channel(early, weights, first + i, k_early, HEADS, R)
            late = add_channel(late, weights, first + i, k_late, HEADS, R)
    return early, late


@triton.jit
def score_tile(
    weights,
    channels,
    records,  # pointers to this KV head
    scoring,
    ranges,
    table,  # of this request
    first_page,
    first_slot,
    context_len,
    page_stride,
    scoring_stride_p,
    ranges_stride_p,
    SCORING: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Scores of the slots n and n + N/2 of several pages: two tuples with fp32 [PAGES, SLOTS] per head.

    A tile reads per page ``R`` runs of N/2 codes (int4) and R pairs of step and zero; the page that is not full yet,
    in one tile of a request, reads R elements of each token's record.
    """
    HALF: tl.constexpr = N // 2
    block = first_page + tl.arange(0, PAGES)
    slot = first_slot + tl.arange(0, SLOTS)
    n_full = context_len // N
    page = tl.load(table + block, mask=block * N < context_len, other=0).to(tl.int64)
    full = block < n_full
    early = (tl.zeros([PAGES, SLOTS], tl.float32),) * HEADS
    late = (tl.zeros([PAGES, SLOTS], tl.float32),) * HEADS
    early, late = score_full_pages(
        *(early, late, weights, channels),
        *(scoring + (page * scoring_stride_p)[:, None] + slot[None, :], ranges + page * ranges_stride_p),
        *(full, full[:, None] & (slot < HALF)[None, :], SCORING, HEADS, R, N, CHANNELS),
    )
    n_rest = context_len - n_full * N
    if (n_rest > 0) & (first_page <= n_full) & (n_full < first_page + PAGES):
        record_at = records + (page * page_stride)[:, None] + slot[None, :] * (2 * D)
        rest = (block == n_full)[:, None]
        mask_early = rest & (slot < tl.minimum(n_rest, HALF))[None, :]
        mask_late = rest & ((slot < HALF) & (slot + HALF < n_rest))[None, :]
        for c in range(R):
            channel = tl.load(channels + c)
            k_early = tl.load(record_at + channel, mask=mask_early, other=0.0).to(tl.float32)
            k_late = tl.load(record_at + channel + N * D, mask=mask_late, other=0.0).to(tl.float32)
            early = add_channel(early, weights, c, k_early, HEADS, R)
            late = add_channel(late, weights, c, k_late, HEADS, R)
    return early, late


@triton.jit
def sum_heads(scores, HEADS: tl.constexpr):
    """The sum over the heads of a tuple."""
    total = scores[0]
    for h in tl.static_range(1, HEADS):
        total += scores[h]
    return total


@triton.jit
def store_heads(head_scores, scores, t, live, max_tokens, HEADS: tl.constexpr):
    """Keep the scores of each head, in the model's type."""
    for h in tl.static_range(HEADS):
        s = scores[h]
        if head_scores.dtype.element_ty == tl.float16:
            s = tl.minimum(tl.maximum(s, -65504.0), 65504.0)
        tl.store(head_scores + h * max_tokens + t, cast(s, head_scores.dtype.element_ty), mask=live)


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
):
    """Step 5: the mean of V over the request, from the last page's sum and its rows."""
    d = tl.arange(0, D_PAD)
    last = (context_len - 1) // N
    page = tl.load(table + last).to(tl.int64)
    rows = tl.zeros([TILE, D_PAD], tl.float32)
    for first in range(0, context_len - last * N, TILE):
        slot = first + tl.arange(0, TILE)
        mask = (slot < context_len - last * N)[:, None] & (d < D)[None, :]
        at = records + page * page_stride + slot[:, None] * (2 * D) + d[None, :]
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


@triton.jit
def score_kernel(
    query,  # [B, H, D]
    records,  # the parts of the pages, [P, G, ...]
    scoring,
    ranges,
    value_sum,
    block_table,
    seq_lens,
    channels,  # int32 [rows, R], written: every split of a row writes the same
    weights,  # fp32 [rows, HEADS, R], written alike
    scores,  # fp32 [rows, max_tokens], written: summed over the group
    extent,  # fp32 [rows, N_SPLITS, 2], written: least and largest score of the tokens that are ranked
    tops,  # fp32 [rows, N_SPLITS, HEADS], written with STATISTICS: largest score of each head,
    sums,  # and its sum of exponentials below that
    head_scores,  # [rows, HEADS, max_tokens], written with KEEP
    mean,  # fp32 [rows, D], written with MEAN
    query_stride_b,
    query_stride_h,
    page_stride,
    head_stride,
    scoring_stride_p,
    scoring_stride_g,
    ranges_stride_p,
    ranges_stride_g,
    sum_stride_p,
    sum_stride_g,
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
    SCORING: tl.constexpr,
    STATISTICS: tl.constexpr,
    KEEP: tl.constexpr,
    PROBS: tl.constexpr,
    MEAN: tl.constexpr,
    N_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * G, N_SPLITS, and one more with MEAN). Per token r / 2 bytes of codes, 4 r / N of ranges, 4 of score."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, g = row // G, row % G
    context_len = tl.load(seq_lens + b)
    is_dense, _, n_local = read_counts(context_len, MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
    if is_dense:
        return
    records += g * head_stride
    table = block_table + b * table_stride
    if MEAN:  # noqa: SIM102  known at compile time, the rest is not
        if split == N_SPLITS:
            value_sum += g * sum_stride_g
            mean += row * D
            mean_value(
                records + D, value_sum, table, mean, context_len, page_stride, sum_stride_p, N, D, D_PAD, TILE=16
            )
            return
    query += b * query_stride_b + g * GROUP * query_stride_h
    channels += row * R
    weights += row * HEADS * R
    scores += row * max_tokens
    head_scores += row * HEADS * max_tokens
    pick_channels(query, channels, weights, query_stride_h, scale, HEADS, GROUP, R, D, D_PAD)
    tl.debug_barrier()  # the loop reads what other threads wrote

    HALF: tl.constexpr = N // 2
    n_ranked = context_len - n_local
    least = tl.full([PAGES, SLOTS], float("inf"), tl.float32)
    most = tl.full([PAGES, SLOTS], float("-inf"), tl.float32)
    lane_tops = (tl.full([PAGES, SLOTS], -1e30, tl.float32),) * HEADS  # finite: a lane may never see a token
    lane_sums = (tl.zeros([PAGES, SLOTS], tl.float32),) * HEADS
    first, stop = split_tokens(tl.cdiv(context_len, N), split, N_SPLITS, PAGES)
    for first_page in range(first, stop, PAGES):
        for first_slot in range(0, HALF, SLOTS):
            early, late = score_tile(
                *(weights, channels, records, scoring + g * scoring_stride_g, ranges + g * ranges_stride_g, table),
                *(first_page, first_slot, context_len, page_stride, scoring_stride_p, ranges_stride_p),
                *(SCORING, HEADS, R, N, D, PAGES, SLOTS, CHANNELS),
            )
            slot = first_slot + tl.arange(0, SLOTS)[None, :]
            t = (first_page + tl.arange(0, PAGES))[:, None] * N + slot
            live_early = (slot < HALF) & (t < context_len)
            live_late = (slot < HALF) & (t + HALF < context_len)
            if STATISTICS:
                lane_tops, lane_sums = note_extremes(lane_tops, lane_sums, early, live_early, HEADS)
                lane_tops, lane_sums = note_extremes(lane_tops, lane_sums, late, live_late, HEADS)
            if KEEP:
                store_heads(head_scores, early, t, live_early, max_tokens, HEADS)
                store_heads(head_scores, late, t + HALF, live_late, max_tokens, HEADS)
            if not PROBS:
                s = sum_heads(early, HEADS)
                tl.store(scores + t, s, mask=live_early)
                ranked = live_early & (t < n_ranked)
                least = tl.where(ranked, tl.minimum(least, s), least)
                most = tl.where(ranked, tl.maximum(most, s), most)
                s = sum_heads(late, HEADS)
                tl.store(scores + t + HALF, s, mask=live_late)
                ranked = live_late & (t + HALF < n_ranked)
                least = tl.where(ranked, tl.minimum(least, s), least)
                most = tl.where(ranked, tl.maximum(most, s), most)

    at = row * N_SPLITS + split
    if not PROBS:
        tl.store(extent + at * 2, tl.min(tl.min(least, 1), 0))
        tl.store(extent + at * 2 + 1, tl.max(tl.max(most, 1), 0))
    if STATISTICS:
        for h in tl.static_range(HEADS):
            top = tl.max(tl.max(lane_tops[h], 1), 0)
            total = tl.sum(tl.sum(lane_sums[h] * tl.exp(lane_tops[h] - top), 1), 0)
            tl.store(tops + at * HEADS + h, top)
            tl.store(sums + at * HEADS + h, total)
