"""`vllm_sparq.ops.sparq_decode.sparq_decode` on a GPU: six to eight launches, no sync, nothing sized by a length.

Bytes per token and KV head for D = 128, bf16, four query heads, r = 16, int4, N = 128, k = S / 16 (a dense read: 512;
files of `triton_common`):

    score       8 of codes, 0.5 of scales (4 where a sector is fetched for each);                   score.py
                writes 4 of group score, and with mean value 8 of head scores
    count       4 of group score, from L2 while a batch has below ten million tokens and KV heads   select.py
    partition   4 of group score; with mean value the sectors of head scores that a picked token is in, at most 8
    finish      the candidates, about one token in a hundred
    cut         only with a mass: of one token in sixteen, 4 of group score and 8 of head scores        mass.py
    attend      512 for one token in sixteen: 32                                                    attend.py
    blend       8 D per split and head, once per row

    track       only where pages track it:    4 of each head's score, then fp32; adds to 4      attention_scores.py

Scratch is that of the scores and 4 bytes for the candidates (with a mass 12 more for its lists), for every token that
the block table could hold. A batch
whose scratch would exceed `SCRATCH_BYTES` runs in slices, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.triton_common.attend import attend, pages_as_records
from vllm_sparq.ops.triton_common.attention_scores import track_attention, tracked_parts
from vllm_sparq.ops.triton_common.codes import codes_of
from vllm_sparq.ops.triton_common.launch import (
    SCRATCH_BYTES,
    Counts,
    cast,
    counts_of,
    merge,
    merge_splits,
    read_counts,
    split_count,
)
from vllm_sparq.ops.triton_common.mass import cut_kernel
from vllm_sparq.ops.triton_common.score import score_kernel
from vllm_sparq.ops.triton_common.select import N_BINS, count_kernel, finish_kernel, head_statistics, partition_kernel
from vllm_sparq.reads import SparqRead

TILE = 1024
"""Tokens of one step of the selection kernels."""


@triton.jit
def blend_kernel(
    partial,
    weight,
    seq_lens,
    tops,
    sums,
    shares,  # fp32 [rows, N_SPLITS + 1, HEADS]
    mean,  # fp32 [rows, D]
    out,  # [B, H, D]
    out_stride_b,
    out_stride_h,
    alpha_floor,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEP: tl.constexpr,
    N_ATTEND_SPLITS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    READ: tl.constexpr,
):
    """Grid (B * H). Step 5: ``alpha y + (1 - alpha) mean``, y merged from its splits."""
    head_row = tl.program_id(0).to(tl.int64)
    b, h = head_row // H, head_row % H
    y = merge_splits(partial, weight, head_row, N_ATTEND_SPLITS, D, D_PAD, STEP)
    d = tl.arange(0, D_PAD)
    is_dense, _n_read, _n_local = read_counts(tl.load(seq_lens + b), READ)
    if not is_dense:
        row = head_row // HEADS  # HEADS query heads share a KV head
        _top, size = head_statistics(tops, sums, row, h % HEADS, N_SPLITS, HEADS)
        split = tl.arange(0, N_SPLITS)
        at = shares + row * (N_SPLITS + 1) * HEADS + h % HEADS
        share = tl.sum(tl.load(at + split * HEADS), 0) + tl.load(at + N_SPLITS * HEADS)
        alpha = tl.minimum(tl.maximum(share / size, alpha_floor), 1.0)
        y = alpha * y + (1.0 - alpha) * tl.load(mean + row * D + d, mask=d < D, other=0.0)
    tl.store(out + b * out_stride_b + h * out_stride_h + d, cast(y, out.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the launches of one slice share; rows are requests times KV heads."""

    n_rows: int
    n_heads: int  # query heads that keep scores of their own, per KV head; 1: the group's sum is enough
    max_tokens: int
    capacity: int  # of the list of cells
    n_splits: int
    lanes: int  # of a ranking tile
    slots: int  # of them, in one page
    runs: int  # tokens of a lane: those whose codes share a byte, or two
    with_mean: bool
    mass: float | None
    least_k: int
    probs: bool
    by_position: bool  # whether slots do not tell which tokens are newest
    with_scores: bool  # whether the attention that tokens get is tracked
    head_dtype: torch.dtype
    counts: Counts

    @property
    def keep(self) -> bool:
        """Whether head scores have a tensor of their own, instead of being the group scores."""
        return self.n_heads > 1 or self.probs or self.by_position

    @property
    def statistics(self) -> bool:
        """Whether the softmax of each head's scores is wanted."""
        return self.with_mean or self.probs or self.with_scores or self.mass is not None


class Scratch:
    """Tensors between the launches of one slice."""

    def __init__(self, plan: Plan, r: int, head_size: int, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(plan.n_rows, *shape, dtype=dtype, device=device)

        n_splits, heads = plan.n_splits, plan.n_heads
        self.channels, self.weights = empty(r, dtype=torch.int32), empty(heads, r)
        self.scores, self.extent = empty(plan.max_tokens), empty(n_splits, 2)
        self.head_scores = empty(heads, plan.max_tokens, dtype=plan.head_dtype) if plan.keep else self.scores
        self.tops, self.sums, self.shares = empty(n_splits, heads), empty(n_splits, heads), empty(n_splits + 1, heads)
        self.mean = empty(head_size if plan.with_mean else 0)
        self.logits = empty(heads, plan.capacity).flatten(0, 1) if plan.with_scores else None
        self.counts, self.pending = empty(n_splits, N_BINS.value, dtype=torch.int32), empty(2, dtype=torch.int32)
        self.cells, self.candidates = empty(plan.capacity, dtype=torch.int32), empty(plan.max_tokens, dtype=torch.int32)
        self.n_cells: torch.Tensor | None = None
        self.tokens = self.cells  # what selection lists: cells, or tokens that have yet to be cut
        if plan.mass is not None:
            self.tokens, self.keys = empty(plan.capacity, dtype=torch.int32), empty(plan.capacity, dtype=torch.int32)
            self.held, self.n_cells = empty(plan.capacity), empty(dtype=torch.int32)


def sparq_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    (n_requests, n_heads, _), n_kv_heads = query.shape, pages.data.shape[1]
    max_tokens = block_table.shape[1] * pages.layout.block_size
    if read.k_per_token <= 1 and read.is_dense(max_tokens):  # so is every shorter context
        dense_decode(query, pages, block_table, seq_lens, scale=scale, out=out)
        return
    per_head = 8 if pages.layout.attention else 4
    per_kv_head = 8 if read.mass is None else 20
    per_slice = max(1, SCRATCH_BYTES // (max_tokens * (per_kv_head * n_kv_heads + per_head * n_heads)))
    for first in range(0, n_requests, per_slice):
        rows = slice(first, min(first + per_slice, n_requests))
        decode_slice(query[rows], pages, block_table[rows], seq_lens[rows], read, scale, out[rows])


def decode_slice(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
) -> None:
    """The requests whose scratch fits at once."""
    plan = make_plan(query, pages, block_table, read)
    work = Scratch(plan, read.r, query.shape[2], query.device)
    score(plan, work, query, pages, block_table, seq_lens, read.r, scale)
    select(plan, work, pages, block_table, seq_lens)
    partial, weight = attend(
        *(query, pages, work.cells, seq_lens),
        scale=scale,
        out=out,
        max_tokens=plan.capacity,
        read=plan.counts,
        keep_splits=plan.with_mean,
        logits=work.logits,
        n_listed=work.n_cells,
    )
    if plan.with_mean:
        blend(plan, work, partial, weight, seq_lens, read.alpha_floor, out)
    elif partial.shape[1]:
        merge(partial, weight, out)
    if work.logits is not None:
        paid = work.head_scores, work.tops, work.sums
        track_attention(pages, block_table, seq_lens, work.logits, weight, paid, plan.counts)


def make_plan(query: torch.Tensor, pages: Pages, block_table: torch.Tensor, read: SparqRead) -> Plan:
    """Launch sizes from shapes and options alone."""
    n_kv_heads, block_size = pages.data.shape[1], pages.layout.block_size
    n_rows, max_tokens = query.shape[0] * n_kv_heads, block_table.shape[1] * block_size
    with_mean, probs = read.alpha_floor < 1.0, read.group_reduce == "probs"
    with_scores = pages.layout.attention
    per_head = with_mean or probs or with_scores or read.mass is not None
    n_heads = query.shape[1] // n_kv_heads if per_head else 1
    codes = codes_of(pages.layout)
    ranks_itself = codes is not None and codes.channel_keys
    runs = codes.keys.runs if ranks_itself else 2
    lanes = 512 if n_heads <= 2 else 256 if n_heads <= 8 else 128  # sums of a lane's tokens and heads stay in registers
    slots = codes.keys.chunk if ranks_itself else triton.next_power_of_2(block_size // 2)
    return Plan(
        n_rows=n_rows,
        n_heads=n_heads,
        max_tokens=max_tokens,
        capacity=max(read.n_selected(max_tokens), min(read.dense_below, max_tokens)),
        n_splits=split_count(n_rows, max_tokens, query.device, min_tokens=TILE, limit=64),
        lanes=lanes,
        slots=min(slots, 64),
        runs=runs,
        with_mean=with_mean,
        mass=read.mass,
        least_k=read.least_k,
        probs=probs,
        by_position=pages.layout.positions,
        with_scores=with_scores,
        head_dtype=torch.float32 if probs or with_scores else query.dtype,
        counts=counts_of(read),
    )


def score(
    plan: Plan,
    work: Scratch,
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    r: int,
    scale: float,
) -> None:
    """Steps 1 and 2, and the mean value."""
    records, head_size = pages_as_records(pages), query.shape[2]
    scheme = None if pages.layout.channel_keys else pages.layout.ranking
    # Step and zero of a channel come in one load. A part that the layout lacks is never touched: any pointer does.
    ranking = pages.data if scheme is None else pages.ranking
    scales = pages.part("scales").view(torch.int32) if scheme in RANKING_BITS else pages.data
    value_sum = pages.value_sum if plan.with_mean else pages.data
    strides = [t.stride(i) for t in (query, records, ranking, scales, value_sum) for i in (0, 1)]
    positions, _, *tracked_strides = tracked_parts(pages)
    score_kernel[(plan.n_rows, plan.n_splits + plan.with_mean)](
        *(query, records, ranking, scales, value_sum, positions, block_table, seq_lens),
        *(work.channels, work.weights, work.scores, work.extent, work.tops, work.sums, work.head_scores, work.mean),
        *(*strides, *tracked_strides, block_table.stride(0), plan.max_tokens, scale),
        G=records.shape[1],
        GROUP=query.shape[1] // records.shape[1],
        HEADS=plan.n_heads,
        R=r,
        N=pages.layout.block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        RANKING=scheme,
        FORMAT=codes_of(pages.layout),
        STATISTICS=plan.statistics,
        KEEP=plan.keep,
        PROBS=plan.probs,
        POSITIONS=plan.by_position,
        MEAN=plan.with_mean,
        N_SPLITS=plan.n_splits,
        RUNS=plan.runs,
        PAGES=max(1, plan.lanes // plan.slots),
        SLOTS=plan.slots,
        CHANNELS=min(triton.next_power_of_2(r), 16 if scheme == "int4" and plan.n_heads <= 4 else 16 // plan.runs),
        READ=plan.counts,
        num_warps=4,
    )


def select(plan: Plan, work: Scratch, pages: Pages, block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Step 3: the list of cells, and the share of each head's probability that is on them."""
    sizes = dict(G=pages.data.shape[1], HEADS=plan.n_heads, N_SPLITS=plan.n_splits, TILE=TILE, READ=plan.counts)
    scores = work.scores, work.head_scores
    statistics = work.tops, work.sums
    lists = work.tokens, work.candidates, work.pending, work.shares
    strides = block_table.stride(0), plan.max_tokens, plan.capacity
    sizes |= dict(N=pages.layout.block_size, POSITIONS=plan.by_position)
    positions, _, *tracked_strides = tracked_parts(pages)
    count_kernel[(plan.n_rows, plan.n_splits)](
        *(positions, block_table, seq_lens, *scores, work.extent, *statistics, work.counts),
        *(*tracked_strides, block_table.stride(0), plan.max_tokens),
        PROBS=plan.probs,
        **sizes,
    )
    codes = codes_of(pages.layout)
    cut = dict(STAGED=codes.staged if codes else 0, STATISTICS=plan.with_mean)
    sizes |= cut if plan.mass is None else dict(STAGED=None, STATISTICS=False)
    partition_kernel[(plan.n_rows, plan.n_splits)](
        *(block_table, seq_lens, *scores, work.extent, *statistics, work.counts, *lists, *strides),
        PROBS=plan.probs,
        **sizes,
        num_warps=8,
    )
    finish_kernel[(plan.n_rows,)](
        *(block_table, seq_lens, *scores, *statistics, *lists, *strides), **sizes, num_warps=8
    )
    if plan.mass is not None:
        cut_kernel[(plan.n_rows,)](
            *(block_table, seq_lens, *scores, *statistics, work.tokens, work.keys, work.held),
            *(work.cells, work.n_cells, work.shares, *strides, plan.mass),
            LEAST_K=plan.least_k,
            **{**sizes, **cut, "TILE": 256},
            num_warps=8,
        )


def blend(
    plan: Plan,
    work: Scratch,
    partial: torch.Tensor,
    weight: torch.Tensor,
    seq_lens: torch.Tensor,
    alpha_floor: float,
    out: torch.Tensor,
) -> None:
    """Step 5."""
    n_requests, n_heads, head_size = out.shape
    blend_kernel[(n_requests * n_heads,)](
        *(partial, weight, seq_lens, work.tops, work.sums, work.shares, work.mean),
        *(out, out.stride(0), out.stride(1), alpha_floor),
        H=n_heads,
        HEADS=plan.n_heads,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        STEP=min(weight.shape[-1], 16),
        N_ATTEND_SPLITS=weight.shape[-1],
        N_SPLITS=plan.n_splits,
        READ=plan.counts,
        num_warps=4,
    )
