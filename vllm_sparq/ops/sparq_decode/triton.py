"""`vllm_sparq.ops.sparq_decode.sparq_decode` on a GPU: six launches, no sync, nothing sized by a length.

Bytes per token and KV head, D = 128, bf16, r = 16, int4, N = 128, k = S / 16 (a dense read: 512):

    score       8 of codes, 0.5 of ranges (4 if a sector is fetched for each), writes 4 of score    triton_score.py
    count       4 of score, in L2 while B G S is below ten million                                  triton_select.py
    partition   4 of score; with mean value 8 of codes again, likewise from L2
    finish      the candidates, about one token in a hundred
    attend      512 for one token in sixteen: 32                                                    triton_attend.py
    merge       8 D per split and head

Scratch is 8 bytes per KV head and token that the block table could hold, beside the list of picked cells. A batch whose
scratch would exceed `SCRATCH_BYTES` runs in slices, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.config import SparqRead
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.triton_attend import attend
from vllm_sparq.ops.triton_common import cast, merge, merge_splits, read_constants, read_counts, split_count
from vllm_sparq.ops.triton_score import score_kernel
from vllm_sparq.ops.triton_select import N_BINS, count_kernel, finish_kernel, head_statistics, partition_kernel

SCRATCH_BYTES = 256 << 20
"""Largest scratch of one slice of the batch."""


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
    MEAN: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * H). Step 5: ``alpha y + (1 - alpha) mean``, y merged from its splits."""
    head_row = tl.program_id(0).to(tl.int64)
    b, h = head_row // H, head_row % H
    y = merge_splits(partial, weight, head_row, N_ATTEND_SPLITS, D, D_PAD, STEP)
    d = tl.arange(0, D_PAD)
    is_dense, _, _ = read_counts(tl.load(seq_lens + b), MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
    if not is_dense:
        row = head_row // HEADS  # HEADS query heads share a KV head
        _, size = head_statistics(tops, sums, row, h % HEADS, N_SPLITS, HEADS)
        split = tl.arange(0, N_SPLITS)
        at = shares + row * (N_SPLITS + 1) * HEADS + h % HEADS
        share = tl.sum(tl.load(at + split * HEADS), 0) + tl.load(at + N_SPLITS * HEADS)
        alpha = tl.minimum(tl.maximum(share / size, alpha_floor), 1.0)
        y = alpha * y + (1.0 - alpha) * tl.load(mean + row * D + d, mask=d < D, other=0.0)
    tl.store(out + b * out_stride_b + h * out_stride_h + d, cast(y, out.dtype.element_ty), mask=d < D)


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
    n_requests, n_kv_heads = query.shape[0], pages.data.shape[1]
    max_tokens = block_table.shape[1] * pages.layout.block_size
    if read.k_per_token <= 1 and read.is_dense(max_tokens):  # so is every shorter context
        dense_decode(query, pages, block_table, seq_lens, scale=scale, out=out)
        return
    per_slice = max(1, SCRATCH_BYTES // (8 * max_tokens * n_kv_heads))
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
    (n_requests, n_heads, head_size), n_kv_heads = query.shape, pages.data.shape[1]
    max_tokens = block_table.shape[1] * pages.layout.block_size
    capacity = max(read.n_selected(max_tokens), min(read.dense_below, max_tokens))
    group, with_mean, probs = n_heads // n_kv_heads, read.alpha_floor < 1.0, read.group_reduce == "probs"
    heads = group if with_mean or probs else 1
    n_rows, numbers = n_requests * n_kv_heads, read_constants(read)
    lanes = 512 if heads <= 4 else 256 if heads <= 8 else 128
    slots = min(triton.next_power_of_2(pages.layout.block_size // 2), 64)
    n_splits = split_count(n_rows, max_tokens, query.device, min_tokens=2 * lanes, limit=64)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n_rows, *shape, dtype=dtype, device=query.device)

    channels, weights = empty(read.r, dtype=torch.int32), empty(heads, read.r)
    scores, extent, mean = empty(max_tokens), empty(n_splits, 2), empty(head_size if with_mean else 0)
    tops, sums, shares = empty(n_splits, heads), empty(n_splits, heads), empty(n_splits + 1, heads)
    counts, pending = empty(n_splits, N_BINS.value, dtype=torch.int32), empty(2, dtype=torch.int32)
    cells, candidates = empty(capacity, dtype=torch.int32), empty(max_tokens, dtype=torch.int32)

    keys, scoring = pages.keys, pages.scoring
    ranges = pages.data if pages.layout.scoring == "model" else pages.ranges
    value_sum = pages.value_sum if with_mean else pages.data
    strides = [t.stride(i) for t in (keys, scoring, ranges) for i in (0, 1)]
    sizes = dict(G=n_kv_heads, HEADS=heads, R=read.r, N=pages.layout.block_size, D=head_size, N_SPLITS=n_splits)
    tiles = dict(PAGES=max(1, lanes // slots), SLOTS=slots)
    common = dict(**sizes, **numbers, SCORING=pages.layout.scoring, num_warps=4)
    parts = keys, scoring, ranges
    score_kernel[(n_rows // n_kv_heads * n_kv_heads, n_splits + with_mean)](
        *(query, *parts, value_sum, block_table, seq_lens, channels, weights, scores, extent, tops, sums, mean),
        *(query.stride(0), query.stride(1), *strides, value_sum.stride(0), value_sum.stride(1)),
        *(block_table.stride(0), max_tokens, scale),
        GROUP=group,
        D_PAD=triton.next_power_of_2(head_size),
        STATISTICS=heads > 1 or with_mean or probs,
        PROBS=probs,
        MEAN=with_mean,
        **common,
        **tiles,
    )
    ranked = parts + (block_table, seq_lens, channels, weights, scores)
    sizes_of = *strides, block_table.stride(0), max_tokens
    count_kernel[(n_rows, n_splits)](
        *(*ranked, extent, tops, sums, counts, *sizes_of), PROBS=probs, TILE=1024, **common, **tiles
    )
    partition_kernel[(n_rows, n_splits)](
        *(*ranked, extent, tops, sums, counts, cells, candidates, pending, shares, *sizes_of, capacity),
        STATISTICS=with_mean,
        PROBS=probs,
        TILE=1024,
        **common,
        **tiles,
    )
    finish_kernel[(n_rows,)](
        *(*ranked, tops, sums, cells, candidates, pending, shares, *sizes_of, capacity),
        STATISTICS=with_mean,
        TILE=1024,
        **common,
    )
    split = attend(
        *(query, pages, cells, seq_lens),
        scale=scale,
        out=out,
        max_tokens=capacity,
        read=numbers,
        keep_splits=with_mean,
    )
    if split is None:
        return
    if not with_mean:
        merge(*split, out)
        return
    n_attend_splits = split[1].shape[-1]
    blend_kernel[(n_requests * n_heads,)](
        *(*split, seq_lens, tops, sums, shares, mean, out, out.stride(0), out.stride(1), read.alpha_floor),
        H=n_heads,
        HEADS=heads,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        STEP=min(n_attend_splits, 16),
        N_ATTEND_SPLITS=n_attend_splits,
        N_SPLITS=n_splits,
        MEAN=with_mean,
        **numbers,
        num_warps=4,
    )
