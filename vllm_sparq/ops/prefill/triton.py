"""`vllm_sparq.ops.prefill.prefill` on a GPU: flash attention over [cached pages ; the new tokens].

The rows of a tile are (token, head of the query group) pairs, so K and V arrive once for the group, and a step of few
new tokens still fills a tensor core tile. Few tiles with long contexts are split over the keys, as in a decode. Where
pages have `attention`, a second pass over K adds to them (`triton_attention`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.prefill.triton_attention import add_prefill_attention
from vllm_sparq.ops.triton_common.attend import LOG2_E, fold, logits_of, pages_as_records
from vllm_sparq.ops.triton_common.codes import channel_order, codes_of, load_block_tile, load_records
from vllm_sparq.ops.triton_common.launch import cast, find_request, split_count, split_tokens, step_kernel
from vllm_sparq.ops.triton_common.merge import add_sinks, merge


@step_kernel
def prefill_kernel(
    query,  # [T, H, D]
    key,  # [T, G, D]
    value,
    records,  # pages [P, G] in the model's type; the value of a record lies D elements after its key
    block_table,
    query_start_loc,
    key_start_loc,
    context_lens,
    partial,  # fp32 [T * H, n_splits, D]
    weight,  # fp32 [T * H, n_splits]; with one split written with TRACKED alone
    out,  # [T, H, D], written here where there is one split
    sinks,  # fp32 [H], with SINKS
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_g,
    value_stride_t,
    value_stride_g,
    page_stride,
    head_stride,
    table_stride,
    out_stride_t,
    out_stride_h,
    scale_log2,
    n_requests,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,  # whether there is more than one
    FORMAT: tl.constexpr,
    KEYS_AHEAD: tl.constexpr,  # whether ``key_start_loc`` differs from ``query_start_loc``
    TRACKED: tl.constexpr,
    SINKS: tl.constexpr,
    CAP: tl.constexpr,
):
    """Grid (tiles of all requests, G, n_splits)."""
    TOKENS: tl.constexpr = ROWS // GROUP
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens of a prompt see most keys: start with them
    g = tl.program_id(1).to(tl.int64)
    split, n_splits = tl.program_id(2), tl.num_programs(2)
    b, tile = find_request(query_start_loc, n_requests, pid, TOKENS, 1)
    if b < 0:
        return
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    if tile * TOKENS >= n_new:
        return
    context_len = tl.load(context_lens + b)
    key_start, n_ahead = start, 0
    if KEYS_AHEAD:
        key_start = tl.load(key_start_loc + b)
        n_ahead = tl.load(key_start_loc + b + 1) - key_start - n_new

    r = tl.arange(0, ROWS)
    d_key, in_key = channel_order(FORMAT, True, D, D_PAD)
    d_value, in_value = channel_order(FORMAT, False, D, D_PAD)
    token = tile * TOKENS + r // GROUP  # among the new ones
    own_row = (r < TOKENS * GROUP) & (token < n_new)
    row = (start + token).to(tl.int64)  # of query and out
    head = g * GROUP + r % GROUP
    q_at = query + (row * query_stride_t + head * query_stride_h)[:, None] + d_key[None, :]
    q = tl.load(q_at, mask=own_row[:, None] & in_key[None, :], other=0.0)

    # Keys are numbered: cached tokens, then new ones up to the tile's last. A split takes a range of whole tiles.
    n_keys = context_len + n_ahead + tl.minimum((tile + 1) * TOKENS, n_new)
    first_key, stop_key = split_tokens(n_keys, split, n_splits, TILE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)

    table = block_table + b.to(tl.int64) * table_stride
    records += g * head_stride
    stop_cached = tl.minimum(stop_key, context_len)
    for first in range(first_key, stop_cached, TILE):
        if FORMAT is None:
            t = first + tl.arange(0, TILE)
            live = t < stop_cached
            page = tl.load(table + t // N, mask=live, other=0).to(tl.int64)
            k, v = load_records(records, page, t % N, live, page_stride, D, D_PAD, FORMAT)
            units = 1.0, 1.0
        else:
            k, v, key_unit, value_unit, live = load_block_tile(
                records, table, first, stop_cached, page_stride, N, D, D_PAD, TILE, FORMAT
            )
            units = key_unit[None, :], value_unit[None, :]
        s = logits_of(q, k, units[0], live[None, :], scale_log2, ROWS, TILE, CAP)
        top, total, acc = fold(s, v, units[1], top, total, acc, BLIND=True)

    key += key_start.to(tl.int64) * key_stride_t + g * key_stride_g
    value += key_start.to(tl.int64) * value_stride_t + g * value_stride_g
    stop_new = stop_key - context_len
    for first in range(tl.maximum(first_key - context_len, 0), stop_new, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop_new
        k_at = key + t.to(tl.int64) * key_stride_t
        v_at = value + t.to(tl.int64) * value_stride_t
        k = tl.load(k_at[None, :] + d_key[:, None], mask=live[None, :] & in_key[:, None], other=0.0)
        v = tl.load(v_at[:, None] + d_value[None, :], mask=live[:, None] & in_value[None, :], other=0.0)
        visible = live[None, :] & (t[None, :] <= (n_ahead + token)[:, None])
        s = logits_of(q, k, 1.0, visible, scale_log2, ROWS, TILE, CAP)
        top, total, acc = fold(s, v, 1.0, top, total, acc, BLIND=True)

    if SINKS:  # once per row
        own_sinks = tl.load(sinks + head, mask=own_row, other=float("-inf"))
        top, total, acc = add_sinks(top, total, acc, tl.where(split == 0, own_sinks, float("-inf")))
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    own = own_row[:, None] & in_value[None, :]
    # Worked out anew: rows and heads kept for it would have spilled for the length of the loops.
    at_split = ((start + tile * TOKENS + r // GROUP).to(tl.int64) * H + g * GROUP + r % GROUP) * n_splits + split
    if SPLIT or TRACKED:
        tl.store(weight + at_split, top + tl.log2(total), mask=own_row)
    if not SPLIT:
        to = out + (row * out_stride_t + head * out_stride_h)[:, None] + d_value[None, :]
        tl.store(to, cast(y, out.dtype.element_ty), mask=own)
    else:
        tl.store(partial + at_split[:, None] * D + d_value[None, :], y, mask=own & (total > 0.0)[:, None])


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    key_start_loc: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    (n_tokens, n_heads, head_size), n_kv_heads = query.shape, key.shape[1]
    n_requests, group, block_size = query_start_loc.shape[0] - 1, n_heads // n_kv_heads, pages.layout.block_size
    if n_requests == 0 or n_tokens == 0:
        return
    quantized = pages.layout.quantized
    n_rows, tile, n_warps = tile_sizes(
        *(head_size, query.dtype, group, n_tokens * group // n_requests),
        quantized=quantized is not None,
        channel_keys=quantized is not None and quantized.channel_keys,
    )
    n_tiles = n_tokens // (n_rows // group) + n_requests
    max_tokens = block_table.shape[1] * block_size + key.shape[0]
    n_splits = split_count(n_tiles * n_kv_heads, max_tokens, query.device, min_tokens=1024)
    scratch = n_splits if n_splits > 1 else 0
    partial = torch.empty(n_tokens * n_heads, scratch, head_size, dtype=torch.float32, device=query.device)
    tracked = pages.layout.attention
    weight = torch.empty(n_tokens * n_heads, n_splits if tracked else scratch, dtype=torch.float32, device=query.device)
    records, cap = pages_as_records(pages), (soft_cap or 0.0) * LOG2_E
    strides = [t.stride(i) for t in (query, key, value, records) for i in (0, 1)]
    key_starts = query_start_loc if key_start_loc is None else key_start_loc
    prefill_kernel[(n_tiles, n_kv_heads, n_splits)](
        *(query, key, value, records, block_table, query_start_loc, key_starts, context_lens, partial, weight, out),
        *(weight if sinks is None else sinks, *strides, block_table.stride(0), out.stride(0), out.stride(1)),
        *(scale * LOG2_E, n_requests),
        H=n_heads,
        GROUP=group,
        N=block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        ROWS=n_rows,
        TILE=tile,
        SPLIT=n_splits > 1,
        FORMAT=codes_of(pages.layout),
        KEYS_AHEAD=key_start_loc is not None,
        TRACKED=tracked,
        SINKS=sinks is not None,
        CAP=cap,
        num_warps=n_warps,
        num_stages=3 if quantized is None else 2 if head_size <= 256 else 1,
    )
    if n_splits > 1:
        merge(partial, weight, out)
    if tracked:
        starts = query_start_loc, key_starts, context_lens
        add_prefill_attention(query, key, pages, block_table, *starts, weight, scale * LOG2_E, cap, n_rows, tile)


def tile_sizes(
    head_size: int, dtype: torch.dtype, group: int, rows_per_request: int, *, quantized: bool, channel_keys: bool
) -> tuple[int, int, int]:
    """(query rows, keys, warps) of a tile: q, and two or three stages of K and V, stay within 160 KiB of shared memory.

    ``rows_per_request`` are the (token, head) pairs of a mean request: short steps get the smallest tile, others the
    largest, so that there are two to compile. fp32 has no tensor cores of its own precision, and keeps its operands in
    registers. Heads of more than 256 elements get the smallest tile, whose sums and codes stay in registers, and those
    of more than 128 half the rows where codes of K are channel-major: 64 spill a kilobyte a thread on sm_80.
    """
    width = triton.next_power_of_2(head_size)
    if dtype == torch.float32:
        most, tile = 16, 16
    else:
        most, tile = (128, 64) if width <= 128 else (64, 32) if width <= 256 else (16 if quantized else 32, 16)
        most = min(most, 32) if channel_keys and width > 128 else most
    least = max(16, triton.next_power_of_2(group))
    n_rows = least if rows_per_request <= least else max(least, most)
    if quantized:  # elements on their way from codes live in registers
        return n_rows, max(16, tile // 2), 8
    return n_rows, tile, 8 if n_rows >= 128 or width > 256 else 4
