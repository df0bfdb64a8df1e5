"""`vllm_sparq.ops.quest_decode.quest_decode` on a GPU: three launches, no sync, nothing sized by a length.

Bytes per token and KV head for D = 128, bf16, k = S / 16 (a dense read: 512):

    rank        32 of bounds (512 a span), 0.25 of the span's score; K itself in the unfinished block
    partition   0.25, from L2, and 4 for each picked token                                          select.py
    attend      512 for one token in sixteen: 32; and 8 D per split and head, once per row          attend.py

Scratch is 4 bytes for every token that may be picked, and 8 for every span that the block table could hold. A batch
whose scratch would exceed `SCRATCH_BYTES` runs in slices, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.triton_common.attend import attend, pages_as_records
from vllm_sparq.ops.triton_common.codes import codes_of, n_in_codes, staged_at
from vllm_sparq.ops.triton_common.count import N_BINS, bin_of, bins_of_sample, items_of
from vllm_sparq.ops.triton_common.launch import (
    Counts,
    aligned,
    counts_of,
    read_counts,
    slices,
    split_count,
    split_tokens,
    step_kernel,
    widen,
)
from vllm_sparq.ops.triton_common.select import partition_kernel
from vllm_sparq.ops.write.triton_ranking import extremes
from vllm_sparq.reads import SPAN_TOKENS, SpansRead

TILE = 128
"""Spans of one step of the selection kernels."""


@triton.jit
def split_signs(query, query_stride_h, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """fp32 [D_PAD] sums over the group of max(q, 0) and of min(q, 0); a NaN is in both."""
    d = tl.arange(0, D_PAD)
    above = tl.zeros([D_PAD], tl.float32)
    below = tl.zeros([D_PAD], tl.float32)
    for h in tl.static_range(GROUP):
        q = widen(tl.load(query + h * query_stride_h + d, mask=d < D, other=0.0))
        above += tl.where(q < 0.0, 0.0, q)
        below += tl.where(q > 0.0, 0.0, q)
    return above, below


@triton.jit
def bound_scores(
    above, below, bounds, table, span, live, bounds_stride_p, N: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr
):
    """fp32, what no summed logit of the spans [SPANS] exceeds; a NaN is the greatest, whatever its bits."""
    d = tl.arange(0, above.shape[0])
    page = tl.load(table + span // (N // SPAN), mask=live, other=0).to(tl.int64)
    at = (bounds + page * bounds_stride_p + span % (N // SPAN) * (2 * D))[:, None] + d[None, :]
    mask = live[:, None] & (d < D)[None, :]
    low = widen(tl.load(at, mask=mask, other=0.0))
    high = widen(tl.load(at + D, mask=mask, other=0.0))
    score = tl.sum(above[None, :] * high + below[None, :] * low, 1)
    return tl.where(score != score, float("nan"), score)


@step_kernel
def rank_kernel(
    query,  # [B, H, D]
    records,  # pages [P, G] of the model's type
    bounds,  # [P, G, N / span, 2, D]
    block_table,  # int32 [B, M]
    seq_lens,  # int32 [B]
    scores,  # fp32 [rows, max_spans], written: what no summed logit of a span exceeds, of all but the newest
    bins,  # fp32 [rows, 2], written alike by every split
    counts,  # int32 [rows, N_SPLITS, N_BINS], written
    arrivals,  # int32 [rows, 2], set to zero for the launches that follow
    query_stride_b,
    query_stride_h,
    page_stride,
    head_stride,
    bounds_stride_p,
    bounds_stride_g,
    table_stride,
    max_spans,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STAGED: tl.constexpr,  # places of a page for the tokens of the newest block; 0 where nothing is staged
    SPANS: tl.constexpr,  # of a tile
    N_SPLITS: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Steps 1 and 2: 2 D elements per span, or of its keys where it has no bounds yet."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, g = row // G, row % G
    tl.store(arrivals + row * 2 + tl.arange(0, 2), tl.zeros([2], tl.int32))
    context_len = tl.load(seq_lens + b)
    is_dense, n_read, _ = read_counts(context_len, READ)
    if is_dense:
        return
    n_ranked, n_wanted = items_of(context_len, n_read, READ)
    share = n_wanted.to(tl.float32) / tl.maximum(n_ranked, 1).to(tl.float32)
    query += b * query_stride_b + g * GROUP * query_stride_h
    above, below = split_signs(query, query_stride_h, GROUP, D, D_PAD)
    records += g * head_stride
    bounds += g * bounds_stride_g
    table = block_table + b * table_stride
    scores += row * max_spans
    d = tl.arange(0, D_PAD)
    SPAN: tl.constexpr = READ.span
    n_bounded = (context_len // N * N if STAGED == 0 else n_in_codes(context_len, N)) // SPAN
    n_bounded = tl.minimum(n_bounded, n_ranked)
    lane = tl.arange(0, SPANS)
    sampled = lane * n_bounded // SPANS
    sample = bound_scores(above, below, bounds, table, sampled, sampled < n_bounded, bounds_stride_p, N, D, SPAN)
    offset, per_unit = bins_of_sample(sample[:, None], (sampled < n_bounded)[:, None], share)
    tl.store(bins + row * 2, offset)
    tl.store(bins + row * 2 + 1, per_unit)
    histogram = tl.zeros([N_BINS], tl.int32)
    start, stop = split_tokens(n_ranked, split, N_SPLITS, SPANS)
    for first in range(start, tl.minimum(stop, n_bounded), SPANS):
        span = first + lane
        live = span < tl.minimum(stop, n_bounded)
        score = bound_scores(above, below, bounds, table, span, live, bounds_stride_p, N, D, SPAN)
        tl.store(scores + span, score, mask=live)
        histogram += tl.histogram(bin_of(score, offset, per_unit, False, READ), N_BINS, mask=live)
    for span in range(tl.maximum(start, n_bounded), stop):  # a block without bounds: few spans, one at a time
        t = span * SPAN + tl.arange(0, SPAN)
        if STAGED == 0:
            page, place = tl.load(table + t // N), t % N
        else:
            page, place = staged_at(table, t, t < context_len, N, STAGED)
        at = (records + page.to(tl.int64) * page_stride + place * (2 * D))[:, None] + d[None, :]
        low, high = extremes(tl.load(at, mask=(d < D)[None, :], other=0.0))
        score = tl.sum(above * high + below * low, 0)
        score = tl.where(score != score, float("nan"), score)
        tl.store(scores + span, score)
        index = bin_of(score, offset, per_unit, False, READ)
        histogram += (tl.arange(0, N_BINS) == index).to(tl.int32)
    tl.store(counts + (row * N_SPLITS + split) * N_BINS + tl.arange(0, N_BINS), histogram)


class Scratch:
    """Tensors between the launches of one slice; rows are requests times KV heads."""

    def __init__(self, n_rows: int, n_splits: int, max_spans: int, capacity: int, device: torch.device | str) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(n_rows, *shape, dtype=dtype, device=device)

        self.scores, self.bins = empty(max_spans, dtype=torch.float32), empty(2, dtype=torch.float32)
        self.counts, self.arrivals = empty(n_splits, N_BINS.value), empty(2)
        self.lists, self.extents = empty(aligned(capacity + max_spans + 1)), empty(n_splits, 2)


def quest_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SpansRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    n_requests, n_kv_heads = query.shape[0], pages.data.shape[1]
    max_tokens = block_table.shape[1] * pages.layout.block_size
    if read.k_per_token < 1 and read.is_dense(max_tokens):  # so is every shorter context
        dense_decode(query, pages, block_table, seq_lens, scale=scale, out=out)
        return
    row_bytes = 4 * list_capacity(read, max_tokens) + 8 * (max_tokens // SPAN_TOKENS)
    for rows in slices(n_requests, n_requests * n_kv_heads * row_bytes):
        decode_slice(query[rows], pages, block_table[rows], seq_lens[rows], read, scale, out[rows])


def list_capacity(read: SpansRead, max_tokens: int) -> int:
    """Tokens that the list of a row may hold, picked or all of them."""
    return aligned(max(SPAN_TOKENS * read.n_spans(max_tokens), min(read.dense_below, max_tokens)))


def decode_slice(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: SpansRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    """The requests whose scratch fits at once."""
    max_tokens = block_table.shape[1] * pages.layout.block_size
    n_rows, max_spans = query.shape[0] * pages.data.shape[1], aligned(max_tokens // SPAN_TOKENS)
    capacity, counts = list_capacity(read, max_tokens), counts_of(read)
    n_splits = split_count(n_rows, max_spans, query.device, min_tokens=TILE, limit=64)
    work = Scratch(n_rows, n_splits, max_spans, capacity, query.device)
    unit = max(8, 16384 // (2 * triton.next_power_of_2(query.shape[2]) * pages.ranking.dtype.itemsize))
    rank(work, query, pages, block_table, seq_lens, counts, unit)
    select(work, pages, block_table, seq_lens, counts, unit, capacity)
    listed = query, pages, work.lists, seq_lens
    attend(*listed, scale=scale, out=out, max_tokens=capacity, read=counts, arrivals=work.arrivals)


def rank(
    work: Scratch,
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: Counts,
    unit: int,
) -> None:
    """Steps 1 and 2, of ``unit`` spans at a time: 16 KiB of bounds on their way."""
    records, bounds, head_size, codes = pages_as_records(pages), pages.ranking, query.shape[2], codes_of(pages.layout)
    n_kv_heads, n_splits = records.shape[1], work.counts.shape[1]
    strides = [t.stride(i) for t in (query, records, bounds) for i in (0, 1)]
    rank_kernel[(work.counts.shape[0], n_splits)](
        *(query, records, bounds, block_table, seq_lens, work.scores, work.bins, work.counts, work.arrivals),
        *(*strides, block_table.stride(0), work.scores.stride(0)),
        G=n_kv_heads,
        GROUP=query.shape[1] // n_kv_heads,
        N=pages.layout.block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        STAGED=0 if codes is None else codes.staged,
        SPANS=unit,
        N_SPLITS=n_splits,
        READ=read,
        num_warps=4,
    )


def select(
    work: Scratch,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: Counts,
    unit: int,
    capacity: int,
) -> None:
    """Step 3: the list of cells. What only `sparq_decode` has is never touched: any pointer does."""
    (n_rows, n_splits), codes, none = work.counts.shape[:2], codes_of(pages.layout), work.bins
    max_spans = work.scores.stride(0)
    partition_kernel[(n_rows, n_splits)](
        *(block_table, seq_lens, work.scores, work.scores, work.bins, none, none, work.counts, work.arrivals),
        *(work.lists, work.extents, none, block_table.stride(0), max_spans, capacity, work.lists.stride(0)),
        G=pages.data.shape[1],
        HEADS=1,
        N=pages.layout.block_size,
        STAGED=codes.staged if codes else 0,
        STATISTICS=False,
        PROBS=False,
        N_SPLITS=n_splits,
        UNIT=unit,
        TILE=TILE,
        READ=read,
        num_warps=4,
    )
