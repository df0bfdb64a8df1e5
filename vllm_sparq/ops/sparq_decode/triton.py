"""`vllm_sparq.ops.sparq_decode.sparq_decode` on a GPU: three launches, no sync, nothing sized by a length.

Bytes per token and KV head for D = 128, bf16, four query heads, r = 16, int4, N = 128, k = S / 16 (a dense read: 512;
files of `triton_common`):

    score       8 of codes, 0.5 of scales (4 where a sector is fetched for each);                   score.py
                writes 4 of group score, and with mean value 8 of head scores
    partition   4 of group score; with mean value the sectors of head scores that a picked token    select.py
                is in, at most 8; the row's last program finishes with two tokens in a hundred
    attend      512 for one token in sixteen: 32; the row's last program merges, and                attend.py
                blends in the mean value: 8 D per split and head, once per row

and one more, before or after partition:

    count       only with ``probs``: 4 of each head's score, writes 4 of group score                select.py
    cut         only with a mass: of one token in sixteen, 4 of group score and 8 of head scores    mass.py
    track       only where pages track it: 4 of each head's score, then fp32; adds to 4             attention_scores.py

Scratch is that of the scores and, for one token in sixteen, 4 bytes of cell, for one in eight 4 of candidate (with a
mass 12 more of its lists), for every token that the block table could hold. A batch whose scratch would exceed
`SCRATCH_BYTES` runs in slices, one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.triton_common.attend import attend, pages_as_records
from vllm_sparq.ops.triton_common.attention_scores import track_attention, tracked_parts
from vllm_sparq.ops.triton_common.codes import codes_of
from vllm_sparq.ops.triton_common.count import N_BINS, count_kernel
from vllm_sparq.ops.triton_common.launch import Counts, aligned, counts_of, slices, split_count
from vllm_sparq.ops.triton_common.mass import cut_kernel
from vllm_sparq.ops.triton_common.merge import MeanValue
from vllm_sparq.ops.triton_common.score import score_kernel
from vllm_sparq.ops.triton_common.select import partition_kernel
from vllm_sparq.reads import SparqRead

TILE = 2048
"""Tokens of one step of the selection kernels."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the launches of one slice share; rows are requests times KV heads."""

    n_rows: int
    r: int
    head_size: int
    n_heads: int  # query heads that keep scores of their own, per KV head; 1: the group's sum is enough
    max_tokens: int
    capacity: int  # of the list of cells
    max_candidates: int  # that are listed; more are looked for among all tokens, unless all are alike
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
    counts: Counts

    @property
    def n_pages(self) -> int:
        """Pages that a ranking tile takes."""
        return max(1, self.lanes // self.slots)

    @property
    def keep(self) -> bool:
        """Whether head scores have a tensor of their own, instead of being the group scores."""
        return self.n_heads > 1 or self.statistics

    @property
    def statistics(self) -> bool:
        """Whether the softmax of each head's scores is wanted."""
        return self.with_mean or self.probs or self.with_scores or self.mass is not None


class Scratch:
    """Tensors between the launches of one slice: no larger than the options need."""

    def __init__(self, plan: Plan, device: torch.device | str) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32, when: bool = True) -> torch.Tensor:
            return torch.empty(plan.n_rows, *(shape if when else (0,)), dtype=dtype, device=device)

        n_splits, heads, integers = plan.n_splits, plan.n_heads, torch.int32
        self.channels, self.weights = empty(plan.r, dtype=integers), empty(heads, plan.r)
        self.scores, self.bins = empty(plan.max_tokens), empty(2)
        self.head_scores = empty(heads, plan.max_tokens) if plan.keep else self.scores
        self.tops, self.sums = (empty(n_splits, heads, when=plan.statistics) for _ in range(2))
        self.shares = empty(n_splits + 1, heads, when=plan.with_mean)
        self.mean = empty(plan.head_size, when=plan.with_mean)
        self.logits = empty(heads, plan.capacity).flatten(0, 1) if plan.with_scores else None
        self.counts, self.arrivals = empty(n_splits, N_BINS.value, dtype=integers), empty(2, dtype=integers)
        self.extents = empty(n_splits, 2, dtype=integers)
        # Cells, or with a mass tokens; candidates, and a place for those that find none.
        self.lists = empty(aligned(plan.capacity + plan.max_candidates + 1), dtype=integers)
        self.n_cells: torch.Tensor | None = None
        self.cells = self.lists
        if plan.mass is not None:
            self.cells, self.keys = (empty(plan.capacity, dtype=integers) for _ in range(2))
            self.held, self.n_cells = empty(plan.capacity), empty(dtype=integers)


@functools.cache
def scratch_bytes(plan: Plan) -> int:
    """Bytes of `Scratch`."""
    tensors = {id(t): t for t in vars(Scratch(plan, "meta")).values() if t is not None}
    return sum(t.nbytes for t in tensors.values())


def sparq_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    max_tokens = block_table.shape[1] * pages.layout.block_size
    if read.k_per_token <= 1 and read.is_dense(max_tokens):  # so is every shorter context
        dense_decode(query, pages, block_table, seq_lens, scale=scale, out=out, sinks=sinks, soft_cap=soft_cap)
        return
    for rows in slices(query.shape[0], scratch_bytes(make_plan(query, pages, block_table, read))):
        decode_slice(query[rows], pages, block_table[rows], seq_lens[rows], read, scale, out[rows], sinks, soft_cap)


def decode_slice(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> None:
    """The requests whose scratch fits at once."""
    plan = make_plan(query, pages, block_table, read)
    work = Scratch(plan, query.device)
    score(plan, work, query, pages, block_table, seq_lens, scale, sinks, soft_cap)
    select(plan, work, pages, block_table, seq_lens, sinks)
    mean_value = None
    if plan.with_mean:
        mean_value = MeanValue(
            tops=work.tops, sums=work.sums, shares=work.shares, mean=work.mean, alpha_floor=read.alpha_floor
        )
    _, weight = attend(
        *(query, pages, work.cells, seq_lens),
        scale=scale,
        out=out,
        max_tokens=plan.capacity,
        read=plan.counts,
        arrivals=work.arrivals,
        mean_value=mean_value,
        logits=work.logits,
        n_listed=work.n_cells,
        sinks=sinks,
        soft_cap=soft_cap,
    )
    if work.logits is not None:
        paid = work.head_scores, work.tops, work.sums
        track_attention(pages, block_table, seq_lens, work.logits, weight, paid, plan.counts)


def make_plan(query: torch.Tensor, pages: Pages, block_table: torch.Tensor, read: SparqRead) -> Plan:
    """Launch sizes from shapes and options alone."""
    n_kv_heads, block_size = pages.data.shape[1], pages.layout.block_size
    n_rows, max_tokens = query.shape[0] * n_kv_heads, block_table.shape[1] * block_size
    capacity = aligned(max(read.n_selected(max_tokens), min(read.dense_below, max_tokens)))
    with_mean, probs = read.alpha_floor < 1.0, read.group_reduce == "probs"
    with_scores = pages.layout.attention
    per_head = with_mean or probs or with_scores or read.mass is not None
    n_heads = query.shape[1] // n_kv_heads if per_head else 1
    codes = codes_of(pages.layout)
    ranks_itself = codes is not None and codes.channel_keys
    runs = codes.keys.runs if ranks_itself else 2
    # The sums of a lane's tokens and heads stay in registers.
    lanes = 1024 if n_heads == 1 else 512 if n_heads <= 4 else 256 if n_heads <= 8 else 128
    slots = codes.keys.chunk if ranks_itself else triton.next_power_of_2(block_size // 2)
    return Plan(
        n_rows=n_rows,
        r=read.r,
        head_size=query.shape[2],
        n_heads=n_heads,
        max_tokens=max_tokens,
        capacity=capacity,
        max_candidates=max(capacity, max_tokens // 8),
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
        counts=counts_of(read),
    )


def score(
    plan: Plan,
    work: Scratch,
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    soft_cap: float | None,
) -> None:
    """Steps 1 and 2, and the mean value."""
    records, r, head_size = pages_as_records(pages), plan.r, plan.head_size
    scheme = None if pages.layout.channel_keys else pages.layout.ranking
    # Step and zero of a channel come in one load. A part that the layout lacks is never touched: any pointer does.
    ranking = pages.data if scheme is None else pages.ranking
    scales = pages.part("scales").view(torch.int32) if scheme in RANKING_BITS else pages.data
    value_sum = pages.value_sum if plan.with_mean else pages.data
    strides = [t.stride(i) for t in (query, records, ranking, scales, value_sum) for i in (0, 1)]
    positions, _, *tracked_strides = tracked_parts(pages)
    score_kernel[(plan.n_rows, plan.n_splits + plan.with_mean)](
        *(query, records, ranking, scales, value_sum, positions, block_table, seq_lens),
        *(work.channels, work.weights, work.scores, work.bins, work.counts, work.arrivals),
        *(work.tops, work.sums, work.head_scores, work.mean, work.weights if sinks is None else sinks),
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
        SINKS=sinks is not None,
        CAP=soft_cap or 0.0,
        N_SPLITS=plan.n_splits,
        RUNS=plan.runs,
        PAGES=plan.n_pages,
        SLOTS=plan.slots,
        CHANNELS=min(triton.next_power_of_2(r), 16 if scheme == "int4" and plan.n_heads <= 4 else 16 // plan.runs),
        READ=plan.counts,
        num_warps=4,
        maxnreg=168 if scheme == "int4" and plan.n_heads == 1 else None,  # three programs to an SM; without, two
    )


def select(
    plan: Plan,
    work: Scratch,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Step 3: the list of cells, and the share of each head's probability that is on them."""
    block_size, codes = pages.layout.block_size, codes_of(pages.layout)
    scores, statistics = (work.scores, work.head_scores), (work.tops, work.sums)
    sizes = dict(G=pages.data.shape[1], HEADS=plan.n_heads, N=block_size)
    sizes |= dict(N_SPLITS=plan.n_splits, READ=plan.counts)
    splits = dict(UNIT=plan.n_pages * block_size)
    if plan.probs:
        positions, _, *tracked_strides = tracked_parts(pages)
        count_kernel[(plan.n_rows, plan.n_splits)](
            *(positions, block_table, seq_lens, *scores, *statistics, work.counts),
            *(*tracked_strides, block_table.stride(0), plan.max_tokens),
            POSITIONS=plan.by_position,
            TILE=TILE,
            **sizes,
            **splits,
        )
    cut = dict(STAGED=codes.staged if codes else 0, STATISTICS=plan.with_mean)
    listed = cut if plan.mass is None else dict(STAGED=None, STATISTICS=False)
    strides = block_table.stride(0), plan.max_tokens, plan.capacity
    partition_kernel[(plan.n_rows, plan.n_splits)](
        *(block_table, seq_lens, *scores, work.bins, *statistics, work.counts, work.arrivals),
        *(work.lists, work.extents, work.shares, *strides, work.lists.stride(0)),
        PROBS=plan.probs,
        TILE=TILE,
        **sizes,
        **splits,
        **listed,
        num_warps=4,
    )
    if plan.mass is not None:
        cut_kernel[(plan.n_rows,)](
            *(block_table, seq_lens, *scores, *statistics, work.lists, work.keys, work.held),
            *(
                work.cells,
                work.n_cells,
                work.shares,
                work.held if sinks is None else sinks,
                *strides[:2],
                work.lists.stride(0),
                plan.capacity,
                plan.mass,
            ),
            LEAST_K=plan.least_k,
            SINKS=sinks is not None,
            TILE=256,
            **sizes,
            **cut,
            num_warps=8,
        )
