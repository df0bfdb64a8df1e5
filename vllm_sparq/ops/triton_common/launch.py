"""What the Triton kernels share: launch sizes, how much a sparse read takes of a context, and the merge of split rows.

A *row* is one request and one KV head; `split` programs share a row's tokens. All addresses are int64.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from vllm_sparq.reads import Counts, Read

PROGRAMS_PER_SM = 4
"""Programs of a decode kernel per multiprocessor: enough to even out the tail, few enough to merge cheaply."""

SCRATCH_BYTES = 256 << 20
"""Largest scratch of one slice of a batch, where scratch grows with the tokens that a block table could hold."""

INTERPRETED_SMS = 1
"""Stands for the multiprocessors of a device where the Triton interpreter runs: some rows get split, cheaply."""


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels are interpreted on the CPU; decided, like the interpretation itself, when this module is imported."""


@functools.cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device, asked once: a query per launch would cost microseconds."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_count(n_rows: int, max_tokens: int, device: torch.device, *, min_tokens: int, limit: int = 128) -> int:
    """Programs per row, a power of two (few variants to compile), from sizes the host knows without a sync."""
    wanted = -(-n_multiprocessors(device) * PROGRAMS_PER_SM // max(n_rows, 1))
    useful = -(-max_tokens // min_tokens)
    return triton.next_power_of_2(max(1, min(wanted, useful, limit)))


@functools.cache
def counts_of(read: Read) -> Counts | None:
    """The compile-time argument ``READ`` of a decode op; None stands for all tokens."""
    return read.counts


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 rounded to ``dtype``; the interpreter would cut off the bits that bf16 has no room for."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen(x):
    """fp32 of ``x``; the interpreter would lose the denormal numbers of bf16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """``acc + a b`` in fp32; the interpreter would multiply the bit patterns of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def read_counts(context_len, READ: tl.constexpr):
    """(is_dense, tokens read, newest tokens among them) of a `SparseRead`, in its integer arithmetic."""
    s = context_len.to(tl.int64)
    k = tl.maximum(s * READ.slope // READ.per_tokens, READ.min_k)
    n_left = s - (k + 1) if READ.span == 1 else (tl.cdiv(s, READ.span) - k // READ.span) * READ.span
    is_dense = (s < READ.dense_below) | (n_left <= 0)
    n_read = tl.where(is_dense, s, s - n_left)
    local = k // 4 if READ.local is None else tl.minimum(k, READ.local)
    return is_dense, n_read.to(tl.int32), tl.minimum(s, local + 1).to(tl.int32)


@triton.jit
def split_tokens(n_tokens, split, N_SPLITS: tl.constexpr, TILE: tl.constexpr):
    """The tokens [start, stop) of one split: whole tiles, in order; none where the splits before took all."""
    per_split = tl.cdiv(tl.cdiv(n_tokens, N_SPLITS), TILE) * TILE
    start = split * per_split
    return start, tl.minimum(n_tokens, start + per_split)


@triton.jit
def find_request(query_start_loc, n_requests, pid, TILE: tl.constexpr, SPARE: tl.constexpr, B_PAD: tl.constexpr):
    """(request, tile of it) that program ``pid`` serves; request -1 for none.

    Request b owns the programs from ``start_b // TILE + SPARE * b`` on: enough for its tiles, whatever the lengths, so
    that the grid follows from shapes alone.
    """
    index = tl.arange(0, B_PAD)
    starts = tl.load(query_start_loc + index, mask=index < n_requests, other=0)
    first = starts // TILE + SPARE * index
    mine = (index < n_requests) & (first <= pid)
    request = tl.sum(mine.to(tl.int32), 0) - 1
    return request, pid - tl.max(tl.where(mine, first, 0), 0)


@triton.jit
def merge_splits(
    partial,  # fp32 [rows, N_SPLITS, D], each split's own softmax average
    weight,  # fp32 [rows, N_SPLITS], log2 of its sum of exponentials, -inf where the split is empty
    row,
    N_SPLITS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEP: tl.constexpr,
):
    """fp32 [D_PAD], the softmax average over all splits of one row; zero where all are empty."""
    d = tl.arange(0, D_PAD)
    row = row.to(tl.int64)
    split = tl.arange(0, N_SPLITS)
    top = tl.max(tl.load(weight + row * N_SPLITS + split), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([STEP], tl.float32)
    acc = tl.zeros([STEP, D_PAD], tl.float32)
    for first in range(0, N_SPLITS, STEP):
        split = first + tl.arange(0, STEP)
        w = tl.load(weight + row * N_SPLITS + split)
        used = w > float("-inf")
        w = tl.exp2(w - top)
        values = tl.load(
            partial + (row * N_SPLITS + split)[:, None] * D + d[None, :],
            mask=used[:, None] & (d < D)[None, :],  # an empty split wrote nothing
            other=0.0,
        )
        total += w
        acc += w[:, None] * values
    total = tl.sum(total, 0)
    return tl.sum(acc, 0) / tl.where(total == 0.0, 1.0, total)


@triton.jit
def merge_kernel(
    partial,
    weight,
    out,  # [B, H, D]
    out_stride_b,
    out_stride_h,
    H: tl.constexpr,
    N_SPLITS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid (B * H). Reads ``4 (D + 1) N_SPLITS`` bytes per head, from L2: they were written a moment ago."""
    row = tl.program_id(0).to(tl.int64)
    y = merge_splits(partial, weight, row, N_SPLITS, D, D_PAD, STEP)
    d = tl.arange(0, D_PAD)
    at = out + (row // H) * out_stride_b + (row % H) * out_stride_h + d
    tl.store(at, cast(y, out.dtype.element_ty), mask=d < D)


def merge(partial: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` [B, H, D] from the splits [B * H, N_SPLITS, D] of `attend` or prefill."""
    n_tokens, n_heads, head_size = out.shape
    n_splits = weight.shape[-1]
    merge_kernel[(n_tokens * n_heads,)](
        partial,
        weight,
        out,
        out.stride(0),
        out.stride(1),
        H=n_heads,
        N_SPLITS=n_splits,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        STEP=min(n_splits, 16),
        num_warps=4,
    )
