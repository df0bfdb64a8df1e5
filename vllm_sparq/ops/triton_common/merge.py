"""The merge of split rows into an output, and step 5 of `sparq_decode`, which blends in the mean value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparq.ops.triton_common.launch import cast, step_kernel


@dataclass(frozen=True, kw_only=True)
class MeanValue:
    """What the rest of the probability is paid with, for each row.

    Attributes:
        tops: fp32 [rows, n_splits, HEADS], the largest score of each head and split.
        sums: of the exponentials below that, alike.
        shares: fp32 [rows, n_splits + 1, HEADS], of the exponentials of the tokens read.
        mean: fp32 [rows, D] of V.
        alpha_floor: the least share of the output that the tokens read have.
    """

    tops: torch.Tensor
    sums: torch.Tensor
    shares: torch.Tensor
    mean: torch.Tensor
    alpha_floor: float

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tops, self.sums, self.shares, self.mean

    @property
    def n_splits(self) -> int:
        return self.tops.shape[1]


@triton.jit
def add_sinks(top, total, acc, sinks):
    """The state of an online softmax (base 2) after one more token in each row, of V = 0.

    ``sinks``: its logits, to the base e; -inf in all splits of a row but one.
    """
    sinks = sinks * 1.4426950408889634
    new_top = tl.maximum(top, sinks)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    return new_top, total * shrink + tl.exp2(sinks - base), acc * shrink[:, None]


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
    top = tl.max(tl.load(weight + row * N_SPLITS + tl.arange(0, N_SPLITS)), 0)
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
def merge_heads(
    partial,
    weight,
    first_head,  # row of the group's first head in both
    h,
    d,
    GROUP: tl.constexpr,
    N_SPLITS: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
):
    """fp32 [heads, D_PAD], `merge_splits` of the heads ``h`` of a group at once."""
    live = (h < GROUP)[:, None]
    at = (first_head + h)[:, None] * N_SPLITS
    weights = tl.load(weight + at + tl.arange(0, N_SPLITS)[None, :], mask=live, other=float("-inf"))
    top = tl.max(weights, 1)
    top = tl.where(top == float("-inf"), 0.0, top)[:, None]
    total = tl.sum(tl.exp2(weights - top), 1)
    acc = tl.zeros([h.shape[0], d.shape[0]], tl.float32)
    for first in range(0, N_SPLITS, STEP):
        split = at + first + tl.arange(0, STEP)[None, :]
        w = tl.load(weight + split, mask=live, other=float("-inf"))
        used = (w > float("-inf"))[:, :, None] & (d < D)[None, None, :]  # an empty split wrote nothing
        values = tl.load(partial + split[:, :, None] * D + d[None, None, :], mask=used, other=0.0)
        acc += tl.sum(tl.exp2(w - top)[:, :, None] * values, 1)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def blend(
    y,  # fp32 [heads, channels]
    h,  # which heads of the group these are
    d,  # and which channels
    row,
    tops,
    sums,
    shares,
    mean,
    alpha_floor,
    sinks,  # of the group
    HEADS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    D: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Step 5: ``alpha y + (1 - alpha) mean``."""
    live = h < HEADS
    row = row.to(tl.int64)
    split = tl.arange(0, N_SPLITS)[None, :]
    at = (row * N_SPLITS + split) * HEADS + h[:, None]
    split_tops = tl.load(tops + at, mask=live[:, None], other=0.0)
    top = tl.max(split_tops, 1)
    size = tl.sum(tl.load(sums + at, mask=live[:, None], other=1.0) * tl.exp(split_tops - top[:, None]), 1)
    at = (row * (N_SPLITS + 1) + split) * HEADS + h[:, None]
    share = tl.sum(tl.load(shares + at, mask=live[:, None], other=0.0), 1)
    share += tl.load(shares + (row * (N_SPLITS + 1) + N_SPLITS) * HEADS + h, mask=live, other=0.0)
    if SINKS:  # always read
        share += tl.exp(tl.load(sinks + h, mask=live, other=0.0) - top)
    alpha = tl.minimum(tl.maximum(share / size, alpha_floor), 1.0)[:, None]
    return alpha * y + (1.0 - alpha) * tl.load(mean + row * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def store_heads(out, y, h, d, own, out_stride_h):
    """Write y [heads, channels] to ``out``, the pointer to the group's first head."""
    tl.store(out + h[:, None] * out_stride_h + d[None, :], cast(y, out.dtype.element_ty), mask=own)


@triton.jit
def finish_row(
    partial,
    weight,
    first_head,
    out,  # pointer to the group's first head
    out_stride_h,
    row,
    is_dense,
    tops,
    sums,
    shares,
    mean,
    alpha_floor,
    sinks,
    GROUP: tl.constexpr,
    N_SPLITS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLEND: tl.constexpr,  # splits of `score_kernel`; 0: nothing to blend
    SINKS: tl.constexpr,
):
    """The output of a query group, whose splits are all there."""
    HEADS_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
    STEP: tl.constexpr = min(N_SPLITS, max(1, 8192 // (HEADS_PAD * D_PAD)))
    h = tl.arange(0, HEADS_PAD)
    d = tl.arange(0, D_PAD)
    y = merge_heads(partial, weight, first_head, h, d, GROUP, N_SPLITS, D, STEP)
    if BLEND > 0:  # noqa: SIM102  known at compile time, the rest is not
        if not is_dense:
            y = blend(y, h, d, row, tops, sums, shares, mean, alpha_floor, sinks, GROUP, BLEND, D, SINKS)
    store_heads(out, y, h, d, (h < GROUP)[:, None] & (d < D)[None, :], out_stride_h)


@step_kernel
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
