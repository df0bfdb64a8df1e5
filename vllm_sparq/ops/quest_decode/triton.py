"""`vllm_sparq.ops.quest_decode.quest_decode` on a GPU: five or six launches, no sync, nothing sized by a length.

Bytes per token and KV head for D = 128, bf16, k = S / 16 (a dense read: 512):

    rank        32 of bounds (512 a span), 0.25 of the span's score; K itself in the unfinished block
    count, partition, finish    0.25 each, from L2, and 4 for each picked token                     triton_select.py
    attend      512 for one token in sixteen: 32                                                    triton_attend.py
    merge       8 D per split and head, once per row

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
from vllm_sparq.ops.triton_common.attention_scores import tracked_parts
from vllm_sparq.ops.triton_common.codes import codes_of, n_in_codes, staged_at
from vllm_sparq.ops.triton_common.launch import (
    SCRATCH_BYTES,
    Counts,
    counts_of,
    merge,
    read_counts,
    split_count,
    split_tokens,
    widen,
)
from vllm_sparq.ops.triton_common.select import N_BINS, count_kernel, finish_kernel, items_of, partition_kernel
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
def note_score(score, live, least, most):
    """(score, least, most): a NaN is the greatest score, whatever its bits, and makes the extent infinite, so that all
    spans are left to the exact part of the selection."""
    is_nan = score != score
    score = tl.where(is_nan, float("nan"), score)
    least = tl.where(live & (score < least), score, least)
    most = tl.where(live & (is_nan | (score > most)), tl.where(is_nan, float("inf"), score), most)
    return score, least, most


@triton.jit
def rank_kernel(
    query,  # [B, H, D]
    records,  # pages [P, G] of the model's type
    bounds,  # [P, G, N / span, 2, D]
    block_table,  # int32 [B, M]
    seq_lens,  # int32 [B]
    scores,  # fp32 [rows, max_spans], written: what no summed logit of a span exceeds, of all but the newest
    extent,  # fp32 [rows, N_SPLITS, 2], written: least and largest of them
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
    context_len = tl.load(seq_lens + b)
    is_dense, n_read, _ = read_counts(context_len, READ)
    if is_dense:
        return
    n_ranked, _ = items_of(context_len, n_read, READ)
    query += b * query_stride_b + g * GROUP * query_stride_h
    above, below = split_signs(query, query_stride_h, GROUP, D, D_PAD)
    records += g * head_stride
    bounds += g * bounds_stride_g
    table = block_table + b * table_stride
    scores += row * max_spans
    d = tl.arange(0, D_PAD)

    SPAN: tl.constexpr = READ.span
    n_bounded = (context_len // N * N if STAGED == 0 else n_in_codes(context_len, N)) // SPAN
    least = tl.full([SPANS], float("inf"), tl.float32)
    most = tl.full([SPANS], float("-inf"), tl.float32)
    start, stop = split_tokens(tl.minimum(n_bounded, n_ranked), split, N_SPLITS, SPANS)
    for first in range(start, stop, SPANS):
        span = first + tl.arange(0, SPANS)
        live = span < stop
        page = tl.load(table + span // (N // SPAN), mask=live, other=0).to(tl.int64)
        at = (bounds + page * bounds_stride_p + span % (N // SPAN) * (2 * D))[:, None] + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        low = widen(tl.load(at, mask=mask, other=0.0))
        high = widen(tl.load(at + D, mask=mask, other=0.0))
        score = tl.sum(above[None, :] * high + below[None, :] * low, 1)
        score, least, most = note_score(score, live, least, most)
        tl.store(scores + span, score, mask=live)

    low_score = tl.min(least, 0)
    high_score = tl.max(most, 0)
    for span in range(n_bounded + split, n_ranked, N_SPLITS):  # a block without bounds: few spans, one at a time
        t = span * SPAN + tl.arange(0, SPAN)
        if STAGED == 0:
            page, place = tl.load(table + t // N), t % N
        else:
            page, place = staged_at(table, t, t < context_len, N, STAGED)
        at = (records + page.to(tl.int64) * page_stride + place * (2 * D))[:, None] + d[None, :]
        low, high = extremes(tl.load(at, mask=(d < D)[None, :], other=0.0))
        score, low_score, high_score = note_score(
            tl.sum(above * high + below * low, 0), span < n_ranked, low_score, high_score
        )
        tl.store(scores + span, score)
    at_split = extent + (row * N_SPLITS + split) * 2
    tl.store(at_split, low_score)
    tl.store(at_split + 1, high_score)


class Scratch:
    """Tensors between the launches of one slice; rows are requests times KV heads."""

    def __init__(self, n_rows: int, n_splits: int, max_spans: int, capacity: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(n_rows, *shape, dtype=dtype, device=device)

        self.scores, self.extent = empty(max_spans, dtype=torch.float32), empty(n_splits, 2, dtype=torch.float32)
        self.counts, self.pending = empty(n_splits, N_BINS.value), empty(2)
        self.cells, self.candidates = empty(capacity), empty(max_spans)


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
    per_slice = max(1, SCRATCH_BYTES // (row_bytes * n_kv_heads))
    for first in range(0, n_requests, per_slice):
        rows = slice(first, min(first + per_slice, n_requests))
        decode_slice(query[rows], pages, block_table[rows], seq_lens[rows], read, scale, out[rows])


def list_capacity(read: SpansRead, max_tokens: int) -> int:
    """Tokens that the list of a row may hold, picked or all of them."""
    return max(SPAN_TOKENS * read.n_spans(max_tokens), min(read.dense_below, max_tokens))


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
    n_rows, max_spans = query.shape[0] * pages.data.shape[1], max_tokens // SPAN_TOKENS
    capacity, counts = list_capacity(read, max_tokens), counts_of(read)
    n_splits = split_count(n_rows, max_spans, query.device, min_tokens=TILE, limit=64)
    work = Scratch(n_rows, n_splits, max_spans, capacity, query.device)
    rank(work, query, pages, block_table, seq_lens, counts)
    select(work, pages, block_table, seq_lens, counts)
    listed = query, pages, work.cells, seq_lens
    partial, weight = attend(*listed, scale=scale, out=out, max_tokens=capacity, read=counts)
    if partial.shape[1]:
        merge(partial, weight, out)


def rank(
    work: Scratch,
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: Counts,
) -> None:
    """Steps 1 and 2."""
    records, bounds, head_size, codes = pages_as_records(pages), pages.ranking, query.shape[2], codes_of(pages.layout)
    n_kv_heads, d_pad = records.shape[1], triton.next_power_of_2(head_size)
    strides = [t.stride(i) for t in (query, records, bounds) for i in (0, 1)]
    rank_kernel[work.extent.shape[:2]](
        *(query, records, bounds, block_table, seq_lens, work.scores, work.extent),
        *(*strides, block_table.stride(0), work.scores.stride(0)),
        G=n_kv_heads,
        GROUP=query.shape[1] // n_kv_heads,
        N=pages.layout.block_size,
        D=head_size,
        D_PAD=d_pad,
        STAGED=0 if codes is None else codes.staged,
        SPANS=max(8, 16384 // (2 * d_pad * bounds.dtype.itemsize)),  # 16 KiB of bounds on their way
        N_SPLITS=work.extent.shape[1],
        READ=read,
        num_warps=4,
    )


def select(work: Scratch, pages: Pages, block_table: torch.Tensor, seq_lens: torch.Tensor, read: Counts) -> None:
    """Step 3: the list of cells. What only `sparq_decode` has is never touched: any pointer does."""
    (n_rows, n_splits), codes = work.extent.shape[:2], codes_of(pages.layout)
    none, max_spans = work.extent, work.scores.stride(0)
    positions, _, *tracked_strides = tracked_parts(pages)
    lists = work.cells, work.candidates, work.pending, none
    strides = block_table.stride(0), max_spans, work.cells.stride(0)
    sizes = dict(G=pages.data.shape[1], HEADS=1, N=pages.layout.block_size, N_SPLITS=n_splits, TILE=TILE)
    sizes |= dict(POSITIONS=False, READ=read)
    count_kernel[(n_rows, n_splits)](
        *(positions, block_table, seq_lens, work.scores, work.scores, work.extent, none, none, work.counts),
        *(*tracked_strides, block_table.stride(0), max_spans),
        PROBS=False,
        **sizes,
    )
    sizes |= dict(STAGED=codes.staged if codes else 0, STATISTICS=False)
    partition_kernel[(n_rows, n_splits)](
        *(block_table, seq_lens, work.scores, work.scores, work.extent, none, none, work.counts, *lists, *strides),
        PROBS=False,
        **sizes,
        num_warps=8,
    )
    finish_kernel[(n_rows,)](
        *(block_table, seq_lens, work.scores, work.scores, none, none, *lists, *strides), **sizes, num_warps=8
    )
