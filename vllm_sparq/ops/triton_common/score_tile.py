"""The approximate scores of a tile of tokens: from the ranking copy, from channel-major K itself, or from records.

Scores run on plain fp32 units: with ``r`` channels a token costs ``r`` unpacked codes for the whole query group, less
than its bytes take to arrive, and tensor cores would want the codes turned around in shared memory first. Each thread
owns tokens and walks the channels, so nothing is reduced across threads.

A lane of a tile owns the slots n, n + N / RUNS, .. of one page: those whose codes share a byte. Codes of 4 or 2 bits
come four bytes at a time, and a byte becomes a number by one instruction: put below the exponent of 1, ``c`` reads as
``1 + c / 128``. Scales and zero points are folded into the weights, once for the tokens of a page that share them.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.codes import n_in_codes
from vllm_sparq.ops.triton_common.launch import INTERPRETED
from vllm_sparq.ops.triton_common.unpack import as_bytes, dequantize, load_scales


@triton.jit
def add_channel(scores, weights, c, keys, HEADS: tl.constexpr, R: tl.constexpr, RUNS: tl.constexpr):
    """``scores[r, h] + weights[h, c] * keys[r]`` for every run and head."""
    result = ()
    for r in tl.static_range(RUNS):
        for h in tl.static_range(HEADS):
            weight = tl.load(weights + h * R + c, mask=c < R, other=0.0)
            result = result + (scores[r * HEADS + h] + weight * keys[r],)
    return result


@triton.jit
def number_of(word, byte: tl.constexpr):
    """fp32 ``1 + b / 128`` of a byte 128 + b of an int32 word."""
    if INTERPRETED:
        bits = (((word >> (8 * byte)) & 255) << 16) | 0x3F000000
    elif byte == 0:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x3f000000, 0x7044;", "=r,r", [word], tl.int32, True, 1)
    elif byte == 1:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x3f000000, 0x7144;", "=r,r", [word], tl.int32, True, 1)
    elif byte == 2:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x3f000000, 0x7244;", "=r,r", [word], tl.int32, True, 1)
    else:
        bits = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0x3f000000, 0x7344;", "=r,r", [word], tl.int32, True, 1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def add_words(sums, words, weights, HEADS: tl.constexpr, RUNS: tl.constexpr):
    """Add one channel: ``weights`` per run and head, fp32 [PAGES]; ``sums`` fp32 [PAGES, words] per run, head, byte."""
    BITS: tl.constexpr = 8 // RUNS
    CODES: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    result = ()
    for r in tl.static_range(RUNS):
        codes = ((words >> (r * BITS)) & CODES) | -2139062144  # the highest bit of each byte
        for h in tl.static_range(HEADS):
            for byte in tl.static_range(4):
                total = sums[(r * HEADS + h) * 4 + byte]
                result = result + (total + weights[r * HEADS + h][:, None] * number_of(codes, byte),)
    return result


@triton.jit
def scores_of_words(sums, weights, zeros, HEADS: tl.constexpr, RUNS: tl.constexpr):
    """fp32 [PAGES, SLOTS] per run and head, of sums by `add_words`, of the sums of its weights, and of zero points."""
    result = ()
    for i in tl.static_range(RUNS * HEADS):
        even = tl.join(sums[4 * i], sums[4 * i + 2])
        both = tl.join(even, tl.join(sums[4 * i + 1], sums[4 * i + 3]))  # [.., j, k] is byte 2 j + k
        total = tl.reshape(both, [both.shape[0], 4 * both.shape[1]])
        result = result + (128.0 * total + (zeros[i] - 128.0 * weights[i])[:, None],)
    return result


@triton.jit
def score_words(
    weights,
    channels,
    codes,  # int32 pointers to each page's codes, [PAGES, words]
    scales,  # pointers to each page's scales, [PAGES]
    full,
    mask,
    step,  # from channel to channel, in words
    first_slot,
    ROWS: tl.constexpr,  # None: the ranking copy
    dtype: tl.constexpr,  # of its scales
    HEADS: tl.constexpr,
    R: tl.constexpr,
    RUNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HOISTED: tl.constexpr,  # whether ``weights`` and ``channels`` are in registers: tuples
):
    """Scores from codes of 4 or 2 bits where ``mask``, as `scores_of_words`; several channels are loaded at a time."""
    sums = (tl.zeros(codes.shape, tl.float32),) * (4 * RUNS * HEADS)
    total_weights = (tl.zeros(full.shape, tl.float32),) * (RUNS * HEADS)
    total_zeros = (tl.zeros(full.shape, tl.float32),) * (RUNS * HEADS)
    for first in range(0, R, CHANNELS):
        words = ()
        loaded = ()
        for i in tl.static_range(CHANNELS):
            channel = channels[i] if HOISTED else tl.load(channels + first + i, mask=first + i < R, other=0)
            words = words + (tl.load(codes + channel * step, mask=mask, other=0),)
            for r in tl.static_range(RUNS):
                if ROWS is None:
                    if r == 0:
                        both = tl.load(scales + channel, mask=full, other=0)
                    scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                    zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                else:
                    group = (r * ROWS.run + first_slot) // ROWS.group
                    at = scales + ROWS.scales + channel * ROWS.scales_step + group * ROWS.scale_bytes
                    scale, zero = load_scales(at, full, dtype, ROWS.numbers)
                loaded = loaded + (scale, zero)
        for i in tl.static_range(CHANNELS):
            own = ()
            new_weights = ()
            new_zeros = ()
            for r in tl.static_range(RUNS):
                for h in tl.static_range(HEADS):
                    if HOISTED:
                        weight = weights[i]
                    else:
                        weight = tl.load(weights + h * R + first + i, mask=first + i < R, other=0.0)
                    scaled = weight * loaded[2 * (i * RUNS + r)]
                    own = own + (scaled,)
                    new_weights = new_weights + (total_weights[r * HEADS + h] + scaled,)
                    zero = weight * loaded[2 * (i * RUNS + r) + 1]
                    new_zeros = new_zeros + (total_zeros[r * HEADS + h] + zero,)
            total_weights, total_zeros = new_weights, new_zeros
            sums = add_words(sums, words[i], own, HEADS, RUNS)
    return scores_of_words(sums, total_weights, total_zeros, HEADS, RUNS)


@triton.jit
def score_copies(
    scores,  # tuple with fp32 [PAGES, SLOTS] per run and head
    weights,
    channels,
    ranking,  # pointers to each page's codes, [PAGES, SLOTS]
    scales,  # pointers to each page's scales, [PAGES]
    full,
    mask,
    RANKING: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the scores from the ranking copy, where ``mask``; the loads of several channels leave before any is used."""
    HALF: tl.constexpr = N // 2
    WIDTH: tl.constexpr = HALF if RANKING == "int4" else N
    for first in range(0, R, CHANNELS):
        codes = ()
        codes_late = ()
        loaded = ()
        for i in tl.static_range(CHANNELS):
            channel = tl.load(channels + first + i, mask=first + i < R, other=0)
            codes = codes + (tl.load(ranking + channel * WIDTH, mask=mask, other=0),)
            if RANKING != "int4":
                codes_late = codes_late + (tl.load(ranking + channel * WIDTH + HALF, mask=mask, other=0),)
            if RANKING != "model":
                loaded = loaded + (tl.load(scales + channel, mask=full, other=0),)
        for i in tl.static_range(CHANNELS):
            if RANKING == "int4":
                k_early = (codes[i] & 15).to(tl.float32)
                k_late = (codes[i] >> 4).to(tl.float32)
            else:
                k_early = codes[i].to(tl.float32)
                k_late = codes_late[i].to(tl.float32)
            if RANKING != "model":
                scale = loaded[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
                zero = (loaded[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)[:, None]
                k_early = zero + scale * k_early
                k_late = zero + scale * k_late
            scores = add_channel(scores, weights, first + i, (k_early, k_late), HEADS, R, 2)
    return scores


@triton.jit
def score_channel_keys(
    scores,  # tuple with fp32 [PAGES, SLOTS] per run and head
    weights,
    channels,
    at,  # pointers to each page's first byte, [PAGES]
    slot,  # in the first run, [SLOTS]; all of one group, in every run
    first_slot,
    full,
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the scores from channel-major K itself, of ``full`` pages."""
    RUNS: tl.constexpr = ROWS.runs
    for first in range(0, R, CHANNELS):
        codes = ()
        scales = ()
        zeros = ()
        for i in tl.static_range(CHANNELS):
            channel = tl.load(channels + first + i, mask=first + i < R, other=0)
            codes_at = (at + ROWS.codes + channel * ROWS.codes_step)[:, None] + slot[None, :]
            codes = codes + (tl.load(codes_at, mask=full[:, None], other=0),)
            for r in tl.static_range(RUNS):
                group = (r * ROWS.run + first_slot) // ROWS.group
                scales_at = at + ROWS.scales + channel * ROWS.scales_step + group * ROWS.scale_bytes
                scale, zero = load_scales(scales_at, full, dtype, ROWS.numbers)
                scales = scales + (scale,)
                zeros = zeros + (zero,)
        for i in tl.static_range(CHANNELS):
            keys = ()
            for r in tl.static_range(RUNS):
                scale, zero = scales[i * RUNS + r][:, None], zeros[i * RUNS + r][:, None]
                keys = keys + (dequantize(codes[i], r, scale, zero, ROWS.bits),)
            scores = add_channel(scores, weights, first + i, keys, HEADS, R, RUNS)
    return scores


@triton.jit
def score_records(
    scores,  # tuple with fp32 [PAGES, SLOTS] per run and head
    weights,
    channels,
    records,
    table,
    block,  # [PAGES]
    page,
    slot,  # in the first run, [SLOTS]
    rest,  # which block is not full yet, or staged
    n_rest,  # tokens of it
    page_stride,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    RUNS: tl.constexpr,
    STAGED: tl.constexpr,
):
    """Add the scores of the newest block, from K in the model's type."""
    RUN: tl.constexpr = N // RUNS
    places = ()
    masks = ()
    for r in tl.static_range(RUNS):
        own = slot + r * RUN
        mask = rest[:, None] & ((slot < RUN) & (own < n_rest))[None, :]
        if STAGED == 0:
            at = records + (page * page_stride)[:, None] + own[None, :] * (2 * D)
        else:
            ahead = tl.load(table + (block + 1)[:, None] + (own // STAGED)[None, :], mask=mask, other=0)
            at = records + ahead.to(tl.int64) * page_stride + (own % STAGED)[None, :] * (2 * D)
        places = places + (at,)
        masks = masks + (mask,)
    for c in range(R):
        channel = tl.load(channels + c)
        keys = ()
        for r in tl.static_range(RUNS):
            keys = keys + (tl.load(places[r] + channel, mask=masks[r], other=0.0).to(tl.float32),)
        scores = add_channel(scores, weights, c, keys, HEADS, R, RUNS)
    return scores


@triton.jit
def full_pages(context_len, N: tl.constexpr, FORMAT: tl.constexpr):
    """Pages of a request that have a ranking copy, or codes."""
    return context_len // N if FORMAT is None else n_in_codes(context_len, N) // N


@triton.jit
def score_tile(
    weights,
    channels,
    held,  # the same, in registers with HOISTED
    records,  # pointers to this KV head
    ranking,
    scales,
    table,  # of this request
    block,  # [PAGES], its blocks
    first_slot,
    context_len,
    page_stride,
    ranking_stride_p,
    scales_stride_p,
    RANKING: tl.constexpr,
    FORMAT: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    RUNS: tl.constexpr,
    PAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HOISTED: tl.constexpr,  # see `score_words`
    FULL: tl.constexpr,  # whether all of the pages are, and ``SLOTS`` divides a run
):
    """Scores of the slots n, n + N / RUNS, .. of some pages: a tuple with fp32 [PAGES, SLOTS] per run and head.

    A tile reads per page ``R`` runs of codes (int4: N/2 of them) and R pairs of scale and zero point, or with
    channel-major K a pair for every group; the page that is not full yet, in one tile of a request, reads R elements of
    each token's record.
    """
    slot = first_slot + tl.arange(0, SLOTS)
    n_full = full_pages(context_len, N, FORMAT)
    if FULL:
        page, full = tl.load(table + block).to(tl.int64), tl.full([PAGES], 1, tl.int1)
    else:
        page, full = tl.load(table + block, mask=block * N < context_len, other=0).to(tl.int64), block < n_full
    scores = (tl.zeros([PAGES, SLOTS], tl.float32),) * (HEADS * RUNS)
    WORDS: tl.constexpr = HEADS * RUNS <= 8 and SLOTS % 4 == 0  # more sums would not fit into registers
    if RANKING is None:
        dtype: tl.constexpr = records.dtype.element_ty
        KEYS: tl.constexpr = FORMAT.keys
        at = as_bytes(records) + page * page_stride * KEYS.number_bytes
        if WORDS and KEYS.bits < 8:
            word = first_slot // 4 + tl.arange(0, SLOTS // 4)
            codes = (at + KEYS.codes).to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + word[None, :]
            scores = score_words(
                *(held[0], held[1], codes, at, full, full[:, None], KEYS.codes_step // 4, first_slot),
                *(KEYS, dtype, HEADS, R, RUNS, CHANNELS, HOISTED),
            )
        else:
            scores = score_channel_keys(
                *(scores, weights, channels, at, slot, first_slot, full, KEYS, dtype, HEADS, R, CHANNELS)
            )
    elif WORDS and RANKING == "int4":
        word = first_slot // 4 + tl.arange(0, SLOTS // 4)
        codes = ranking.to(tl.pointer_type(tl.int32), bitcast=True)
        codes = codes + (page * (ranking_stride_p // 4))[:, None] + word[None, :]
        scores = score_words(
            *(held[0], held[1], codes, scales + page * scales_stride_p),
            *(full, full[:, None] & ((word < N // 8) | FULL)[None, :], N // 8, first_slot, None, None, HEADS, R, 2),
            *(CHANNELS, HOISTED),
        )
    else:
        scores = score_copies(
            *(scores, weights, channels),
            *(ranking + (page * ranking_stride_p)[:, None] + slot[None, :], scales + page * scales_stride_p),
            *(full, full[:, None] & (slot < N // 2)[None, :], RANKING, HEADS, R, N, CHANNELS),
        )
    if FULL:
        return scores
    n_rest = context_len - n_full * N
    if (n_rest > 0) & (tl.max((block == n_full).to(tl.int32), 0) > 0):
        STAGED: tl.constexpr = 0 if FORMAT is None else FORMAT.staged
        scores = score_records(
            *(scores, weights, channels, records, table, block, page, slot, block == n_full, n_rest, page_stride),
            *(HEADS, R, N, D, RUNS, STAGED),
        )
    return scores
