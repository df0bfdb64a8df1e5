"""What the Triton kernels write beside K and V where tokens may be evicted: positions, and the attention tokens get.

Every score is added to by one program of a launch: no atomics, one result.
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.count import row_statistics
from vllm_sparq.ops.triton_common.launch import Counts, read_counts, split_count, step_kernel


def tracked_parts(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Positions and scores [P, G, N], and the strides of both in elements (of pages, of KV heads).

    A part that the layout lacks is never touched: any pointer does.
    """
    if not pages.layout.positions:
        return pages.data, pages.data, 0, 0
    positions = pages.positions
    scores = pages.attention if pages.layout.attention else pages.data
    return positions, scores, positions.stride(0), positions.stride(1)


@triton.jit
def track_arrivals(positions, scores, slot_0, n_old, stop, ATTENTION: tl.constexpr):
    """Tokens arrived in the slots ``n_old : stop`` of a page and KV head; a token in slot 0 has position ``slot_0``."""
    for n in range(n_old, stop, 64):
        slot = n + tl.arange(0, 64)
        tl.store(positions + slot, slot_0 + slot, mask=slot < stop)
        if ATTENTION:
            tl.store(scores + slot, tl.zeros([64], tl.float32), mask=slot < stop)


@triton.jit
def merged_weights(weight, row, GROUP: tl.constexpr, N_SPLITS: tl.constexpr):
    """log2 of each head's sum of exponentials over the whole row: a tuple."""
    result = ()
    for h in tl.static_range(GROUP):
        split_weights = tl.load(weight + (row * GROUP + h) * N_SPLITS + tl.arange(0, N_SPLITS))
        top = tl.max(split_weights, 0)
        result = result + (top + tl.log2(tl.sum(tl.exp2(split_weights - top), 0)),)
    return result


@triton.jit
def approximate_weights(tops, sums, row, GROUP: tl.constexpr, N_SPLITS: tl.constexpr):
    """The same for approximate scores, which are to the base e."""
    row_tops, row_sums = row_statistics(tops, sums, row, N_SPLITS, GROUP)
    result = ()
    for h in tl.static_range(GROUP):
        result = result + (row_tops[h] * 1.4426950408889634 + tl.log2(row_sums[h]),)
    return result


@triton.jit
def add_attention(
    scores,  # pointer to this KV head
    table,
    logits,  # [GROUP, logits_stride]
    logits_stride,
    weights,  # tuple: log2 of each head's sum of exponentials
    unit,  # log2 of the base of the logits
    context_len,
    scores_stride_p,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the mean over the group of each token's probability; the programs of a row take its tiles in turns."""
    for first in range(tl.program_id(1) * TILE, context_len, tl.num_programs(1) * TILE):
        t = first + tl.arange(0, TILE)
        live = t < context_len
        page = tl.load(table + t // N, mask=live, other=0).to(tl.int64)
        total = tl.zeros([TILE], tl.float32)
        for h in tl.static_range(GROUP):
            logit = tl.load(logits + h * logits_stride + t, mask=live, other=0.0)
            total += tl.exp2(logit * unit - weights[h])
        at = scores + page * scores_stride_p + t % N
        tl.store(at, tl.load(at, mask=live, other=0.0) + total / GROUP, mask=live)


@step_kernel
def attention_kernel(
    scores,  # fp32 [P, G, N]
    block_table,
    seq_lens,
    logits,  # fp32 [B * H, logits_stride], of rows that are read densely
    weight,  # fp32 [B * H, N_ATTEND_SPLITS]
    head_scores,  # fp32 [rows, GROUP, max_tokens], of the other rows
    tops,  # fp32 [rows, N_SPLITS, GROUP]
    sums,
    scores_stride_p,
    scores_stride_g,
    table_stride,
    logits_stride,
    max_tokens,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    N_ATTEND_SPLITS: tl.constexpr,
    N_SPLITS: tl.constexpr,
    READ: tl.constexpr,  # None: all rows are read densely
):
    """Grid (B * G, programs of a row). Reads 4 bytes per token and query head, and adds to 4 per token."""
    row = tl.program_id(0).to(tl.int64)
    b, g = row // G, row % G
    context_len = tl.load(seq_lens + b)
    if context_len <= tl.program_id(1) * TILE:
        return
    table = block_table + b * table_stride
    scores += g * scores_stride_g
    is_dense = context_len > 0
    if READ is not None:
        is_dense, _, _ = read_counts(context_len, READ)
        if not is_dense:
            weights = approximate_weights(tops, sums, row, GROUP, N_SPLITS)
            head_scores += row * GROUP * max_tokens
            add_attention(
                *(scores, table, head_scores, max_tokens, weights, 1.4426950408889634, context_len, scores_stride_p),
                *(GROUP, N, TILE),
            )
    if is_dense:
        weights = merged_weights(weight, row, GROUP, N_ATTEND_SPLITS)
        logits += row * GROUP * logits_stride
        add_attention(
            *(scores, table, logits, logits_stride, weights, 1.0, context_len, scores_stride_p), *(GROUP, N, TILE)
        )


def track_attention(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    logits: torch.Tensor,
    weight: torch.Tensor,
    approximate: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    read: Counts | None = None,
) -> None:
    """Add to `Pages.attention` what a decode op paid: ``logits`` [B * H, max_tokens] and ``weight`` of `attend`.

    With ``read``, rows that are not dense pay by their ``approximate`` scores: head scores, tops and sums of
    `score`.
    """
    n_rows, tile = block_table.shape[0] * pages.data.shape[1], 256
    max_tokens = block_table.shape[1] * pages.layout.block_size
    head_scores, tops, sums = approximate or (logits, logits, logits)
    attention_kernel[(n_rows, split_count(n_rows, max_tokens, logits.device, min_tokens=tile))](
        *(pages.attention, block_table, seq_lens, logits, weight, head_scores, tops, sums),
        *(pages.attention.stride(0), pages.attention.stride(1), block_table.stride(0), logits.stride(0), max_tokens),
        G=pages.data.shape[1],
        GROUP=logits.shape[0] // n_rows,
        N=pages.layout.block_size,
        TILE=tile,
        N_ATTEND_SPLITS=weight.shape[1],
        N_SPLITS=tops.shape[1] if read is not None else 1,
        READ=read,
        num_warps=4,
    )
