"""Attention of one query group over tokens, split over them: the exact part of every decode op.

After a launch that has set counters to zero, the last program of a row to arrive merges its splits, and blends in the
mean value where `sparq_decode` wants it; else `merge` is a launch of its own.

The tokens of a row are either all of a request, found through its block table, or a list of cells that `sparq_decode`
or `quest_decode` picked (a cell is ``page * N + slot``). One load leads from a token to its K and V, so the pipeliner
can run ahead.

Quantized pages take two loops, one over tokens in codes and one over those of the newest block, which are staged; the
cell of a staged token is the complement of ``page * N + place``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.formats import Format
from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.codes import (
    channel_order,
    codes_of,
    load_block_tile,
    load_cells,
    load_records,
    n_in_codes,
    staged_at,
    tile_slots,
)
from vllm_sparq.ops.triton_common.launch import (
    Counts,
    cast,
    dot,
    is_last_to_arrive,
    read_counts,
    soft_capped,
    split_count,
    split_tokens,
    step_kernel,
)
from vllm_sparq.ops.triton_common.merge import MeanValue, add_sinks, blend, finish_row, store_heads

LOG2_E = 1.4426950408889634


@triton.jit
def logits_of(q, k, unit, visible, scale_log2, ROWS: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr):
    """fp32 [ROWS, TILE] logits to the base 2 of q [ROWS, D] and k [D, TILE], times its unit; -inf where not visible."""
    s = soft_capped(dot(q, k, tl.zeros([ROWS, TILE], tl.float32)) * (unit * scale_log2), CAP)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def fold(s, v, unit, top, total, acc, BLIND: tl.constexpr):
    """One step of the online softmax: logits [ROWS, TILE] and v [TILE, D], times its unit.

    BLIND: a row may have seen nothing yet even after this step.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if BLIND else new_top
    shrink = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    acc = dot(cast(p * unit, v.dtype), v, acc * shrink[:, None])
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def fold_tokens(q, k, v, units, live, scale_log2, top, total, acc, CAP: tl.constexpr, BLIND: tl.constexpr):
    """One step of the online softmax over tokens: q [D, HEADS], k [D, TILE], v [TILE, D], acc [D, HEADS].

    Tokens are the rows of both products, so that few heads fill a tensor core tile. ``units`` of K and V: [TILE, 1], or
    numbers. BLIND: a head may have seen nothing yet even after this step. Returns the logits too, [TILE, HEADS] to the
    base 2.
    """
    s = dot(tl.trans(k), q, tl.zeros([k.shape[1], q.shape[1]], tl.float32)) * (units[0] * scale_log2)
    s = soft_capped(s, CAP)
    s = tl.where(live[:, None], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if BLIND else new_top
    shrink = tl.exp2(top - base)
    p = tl.exp2(s - base[None, :])
    acc = dot(tl.trans(v), cast(p * units[1], v.dtype), acc * shrink[None, :])
    return s, new_top, total * shrink + tl.sum(p, 0), acc


@triton.jit
def keep_logits(logits, s, t, live, is_dense, logits_stride, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr):
    """Logits [TILE, GROUP_PAD] of the tokens ``t`` of a dense row; ``logits`` points to the group's first head."""
    if is_dense:
        h = tl.arange(0, GROUP_PAD)[None, :]
        tl.store(logits + h * logits_stride + t[:, None], s, mask=(h < GROUP) & live[:, None])


@triton.jit
def fold_quantized(
    q,  # [D, ROWS] in the channel order of K
    records,
    tokens,
    start,
    stop,
    n_coded,  # tokens that are in codes
    page_stride,
    scale_log2,
    logits,
    logits_stride,
    is_dense,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
    FORMAT: tl.constexpr,
    TRACKED: tl.constexpr,
    CAP: tl.constexpr,
):
    """(top, total, acc) of the tokens ``start : stop`` of a row: first those in codes, then staged ones."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([D_PAD, ROWS], tl.float32)
    for first in range(start, stop if LISTED else tl.minimum(stop, n_coded), TILE):
        if LISTED:
            t = first + tl.arange(0, TILE)
            cell = tl.load(tokens + t, mask=t < stop, other=-1)
            live = cell >= 0
            cell = tl.maximum(cell, 0)
            k, v, key_unit, value_unit = load_cells(
                records, (cell // N).to(tl.int64), cell % N, live, page_stride, D, D_PAD, FORMAT
            )
        else:
            k, v, key_unit, value_unit, live = load_block_tile(
                records, tokens, first, tl.minimum(stop, n_coded), page_stride, N, D, D_PAD, TILE, FORMAT
            )
        units = key_unit[:, None], value_unit[:, None]
        s, top, total, acc = fold_tokens(q, k, v, units, live, scale_log2, top, total, acc, CAP, BLIND=LISTED)
        if TRACKED:
            if LISTED:
                t = first + tl.arange(0, TILE)
            else:
                block, slot, _ = tile_slots(first, stop, N, FORMAT, TILE)
                t = block * N + slot
            keep_logits(logits, s, t, live, is_dense, logits_stride, GROUP, ROWS)
    for first in range(start if LISTED else tl.maximum(start, n_coded), stop, TILE):
        t = first + tl.arange(0, TILE)
        if LISTED:
            cell = ~tl.load(tokens + t, mask=t < stop, other=0)
            live = cell >= 0
            cell = tl.maximum(cell, 0)
            page, place = cell // N, cell % N
        else:
            live = t < stop
            page, place = staged_at(tokens, t, live, N, FORMAT.staged)
        if tl.max(live.to(tl.int32), 0) > 0:
            k, v = load_records(records, page.to(tl.int64), place, live, page_stride, D, D_PAD, FORMAT, True)
            s, top, total, acc = fold_tokens(q, k, v, (1.0, 1.0), live, scale_log2, top, total, acc, CAP, BLIND=False)
            if TRACKED:
                keep_logits(logits, s, t, live, is_dense, logits_stride, GROUP, ROWS)
    return top, total, acc


@step_kernel
def attend_kernel(
    query,  # [B, H, D]
    records,  # pages [P, G] in the model's type; the value of a record lies D elements after its key
    tokens,  # with READ int32 cells [rows, capacity]; else the block table, int32 [B, M]
    seq_lens,  # int32 [B]
    n_listed,  # COUNTED: int32 [rows], cells of a row; else it follows from its length
    partial,  # fp32 [B * H, N_SPLITS, D]
    weight,  # fp32 [B * H, N_SPLITS]; with one split written with TRACKED alone
    logits,  # fp32 [B * H, logits_stride], written with TRACKED: of rows that are read densely, to the base 2
    out,  # [B, H, D], written where there is one split, and with ARRIVALS
    arrivals,  # int32 [rows, 2], the second of a row zero: with ARRIVALS counts programs of this launch
    tops,  # with BLEND what `triton_common.blend` takes
    sums,
    shares,
    mean,
    alpha_floor,
    sinks,  # fp32 [H], with SINKS
    query_stride_b,
    query_stride_h,
    page_stride,
    head_stride,
    tokens_stride,
    logits_stride,
    out_stride_b,
    out_stride_h,
    scale_log2,  # scale * log2(e)
    G: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    N_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    TRACKED: tl.constexpr,
    COUNTED: tl.constexpr,
    ARRIVALS: tl.constexpr,
    BLEND: tl.constexpr,  # splits of `score_kernel`; 0: nothing to blend
    SINKS: tl.constexpr,
    CAP: tl.constexpr,  # of logits to the base 2; 0: none
    READ: tl.constexpr,  # None: all tokens of a row; else those that it lists
):
    """Grid (B * G, N_SPLITS). Reads 2 D elements per token, or their codes, once for the whole query group."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = (row // G).to(tl.int64)
    g = (row % G).to(tl.int64)
    context_len = tl.load(seq_lens + b)
    n_tokens, is_dense = context_len, context_len >= 0
    LISTED: tl.constexpr = READ is not None
    if LISTED:
        is_dense, n_tokens, _ = read_counts(context_len, READ)
        tokens += row.to(tl.int64) * tokens_stride
        if COUNTED:
            n_tokens = tl.load(n_listed + row)
    else:
        tokens += b * tokens_stride
    start, stop = split_tokens(n_tokens, split, N_SPLITS, TILE)

    h = tl.arange(0, GROUP_PAD)
    head = g * GROUP + h
    d_key, in_key = channel_order(FORMAT, True, D, D_PAD)
    q_at = query + b * query_stride_b + head[None, :] * query_stride_h + d_key[:, None]
    q = tl.load(q_at, mask=(h < GROUP)[None, :] & in_key[:, None], other=0.0)
    records += g * head_stride
    logits += (b * G + g) * GROUP * logits_stride
    if FORMAT is None:
        top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([D_PAD, GROUP_PAD], tl.float32)
        for first in range(start, stop, TILE):
            t = first + tl.arange(0, TILE)
            live = t < stop
            if LISTED:
                cell = tl.load(tokens + t, mask=live, other=0)
                page, slot = cell // N, cell % N
            elif N % TILE == 0:  # a tile is in one page
                page, slot = tl.load(tokens + first // N + tl.arange(0, 1)), first % N + tl.arange(0, TILE)
            else:
                page, slot = tl.load(tokens + t // N, mask=live, other=0), t % N
            k, v = load_records(records, page.to(tl.int64), slot, live, page_stride, D, D_PAD, FORMAT, True)
            s, top, total, acc = fold_tokens(q, k, v, (1.0, 1.0), live, scale_log2, top, total, acc, CAP, BLIND=False)
            if TRACKED:
                keep_logits(logits, s, t, live, is_dense, logits_stride, GROUP, GROUP_PAD)
    else:
        n_coded = n_in_codes(context_len, N)
        top, total, acc = fold_quantized(
            *(q, records, tokens, start, stop, n_coded, page_stride, scale_log2, logits, logits_stride, is_dense),
            *(GROUP_PAD, GROUP, N, D, D_PAD, TILE, LISTED, FORMAT, TRACKED, CAP),
        )

    acc = tl.trans(acc)
    if SINKS:  # once per row
        own_sinks = tl.load(sinks + head, mask=h < GROUP, other=float("-inf"))
        top, total, acc = add_sinks(top, total, acc, tl.where(split == 0, own_sinks, float("-inf")))
        sinks += g * GROUP
    d, in_value = channel_order(FORMAT, False, D, D_PAD)
    own = (h < GROUP)[:, None] & in_value[None, :]
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at_split = (b * G * GROUP + head) * N_SPLITS + split
    if N_SPLITS > 1 or TRACKED:
        tl.store(weight + at_split, top + tl.log2(total), mask=h < GROUP)
    out += b * out_stride_b + g * GROUP * out_stride_h
    if N_SPLITS > 1:
        tl.store(partial + at_split[:, None] * D + d[None, :], y, mask=own & (total > 0.0)[:, None])
        if ARRIVALS:  # noqa: SIM102  known at compile time, the rest is not
            if is_last_to_arrive(arrivals + row.to(tl.int64) * 2 + 1, N_SPLITS):
                finish_row(
                    *(partial, weight, (b * G + g) * GROUP, out, out_stride_h, row, is_dense),
                    *(tops, sums, shares, mean, alpha_floor, sinks, GROUP, N_SPLITS, D, D_PAD, BLEND, SINKS),
                )
    else:
        if BLEND > 0:  # noqa: SIM102
            if not is_dense:
                y = blend(y, h, d, row, tops, sums, shares, mean, alpha_floor, sinks, GROUP, BLEND, D, SINKS)
        store_heads(out, y, h, d, own, out_stride_h)


def tile_tokens(head_size: int, dtype: torch.dtype, format: Format | None) -> int:
    """Tokens of one step: 16 KiB of K, so that three programs with K and V twice fit an SM; fp32 lives in registers.

    Of codes of 8 bits twice as many, up to 128: they have half the bytes, and addresses of their own.
    """
    row_bytes = triton.next_power_of_2(head_size) * dtype.itemsize
    n_tokens = max(16, (8192 if dtype == torch.float32 else 16384) // row_bytes)
    eight_bits = format is not None and format.key.bits == 8 and dtype != torch.float32
    return max(n_tokens, min(2 * n_tokens, 128)) if eight_bits else n_tokens


def pages_as_records(pages: Pages) -> torch.Tensor:
    """Pages [P, G, ...] in the model's dtype, from K of their first record on; of quantized ones, the first staged."""
    return pages.keys if pages.layout.quantized is None else pages.staged[..., 0, :]


def attend(
    query: torch.Tensor,
    pages: Pages,
    tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    max_tokens: int,
    read: Counts | None = None,
    arrivals: torch.Tensor | None = None,
    mean_value: MeanValue | None = None,
    logits: torch.Tensor | None = None,
    n_listed: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write ``out``, or without ``arrivals`` return (partial, weight) for `merge` where rows are split.

    ``tokens`` is the block table, or with ``read`` the list of cells; ``max_tokens`` bounds the tokens of a row.
    ``arrivals``, int32 [rows, 2], holds a zero for each row behind what others count; ``mean_value`` needs it. With
    ``logits``, fp32 [B * H, max_tokens], those of densely read rows are kept there, and there is a weight always.
    ``n_listed``, int32 [rows], counts the cells of each row, where that does not follow from its length.
    ``sinks``, fp32 [H], are one more logit of each head; ``soft_cap`` is what logits of tokens stay below.
    """
    (n_requests, n_heads, head_size), n_kv_heads = query.shape, pages.data.shape[1]
    records, group, quantized = pages_as_records(pages), n_heads // n_kv_heads, pages.layout.quantized
    n_splits = split_count(n_requests * n_kv_heads, max_tokens, query.device, min_tokens=256)
    scratch = n_splits if n_splits > 1 else 0
    partial = torch.empty(n_requests * n_heads, scratch, head_size, dtype=torch.float32, device=query.device)
    n_weights = scratch if logits is None else n_splits
    weight = torch.empty(n_requests * n_heads, n_weights, dtype=torch.float32, device=query.device)
    # What is not asked for is never touched: any pointer does.
    statistics = (weight,) * 4 if mean_value is None else mean_value.tensors
    attend_kernel[(n_requests * n_kv_heads, n_splits)](
        *(query, records, tokens, seq_lens, seq_lens if n_listed is None else n_listed),
        *(partial, weight, weight if logits is None else logits, out, seq_lens if arrivals is None else arrivals),
        *(*statistics, 0.0 if mean_value is None else mean_value.alpha_floor, weight if sinks is None else sinks),
        *(query.stride(0), query.stride(1), records.stride(0), records.stride(1), tokens.stride(0)),
        *(0 if logits is None else logits.stride(0), out.stride(0), out.stride(1), scale * LOG2_E),
        G=n_kv_heads,
        GROUP=group,
        GROUP_PAD=max(8, triton.next_power_of_2(group)),
        N=pages.layout.block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        TILE=tile_tokens(head_size, query.dtype, quantized),
        N_SPLITS=n_splits,
        FORMAT=codes_of(pages.layout),
        TRACKED=logits is not None,
        COUNTED=n_listed is not None,
        ARRIVALS=arrivals is not None,
        BLEND=0 if mean_value is None else mean_value.n_splits,
        SINKS=sinks is not None,
        CAP=(soft_cap or 0.0) * LOG2_E,
        READ=read,
        num_warps=4 if quantized is None or head_size <= 128 else 8,  # what codes become lives in registers
        num_stages=5,  # two of K and V: the load of the cell takes the others
    )
    return partial, weight
