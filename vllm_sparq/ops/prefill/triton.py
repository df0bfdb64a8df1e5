"""`vllm_sparq.ops.prefill.prefill` on a GPU: flash attention over [cached pages ; the new tokens].

The rows of a tile are (token, head of the query group) pairs, so K and V arrive once for the group, and a step of few
new tokens still fills a tensor core tile. Few tiles with long contexts are split over the keys, as in a decode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_attend import LOG2_E
from vllm_sparq.ops.triton_common import cast, dot, find_request, merge, split_count, split_tokens


@triton.jit
def fold(q, k, v, visible, top, total, acc, scale_log2, ROWS: tl.constexpr, TILE: tl.constexpr):
    """One step of the online softmax: q [ROWS, D] over k [D, TILE] and v [TILE, D]."""
    s = dot(q, k, tl.zeros([ROWS, TILE], tl.float32)) * scale_log2
    s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
    shrink = tl.exp2(top - base)
    p = tl.exp2(s - base[:, None])
    acc = dot(cast(p, v.dtype), v, acc * shrink[:, None])
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["n_requests"])
def prefill_kernel(
    query,  # [T, H, D]
    key,  # [T, G, D]
    value,
    records,  # keys of the pages [P, G, N, D]; V lies D elements behind
    block_table,
    query_start_loc,
    context_lens,
    partial,  # fp32 [T * H, N_SPLITS, D]
    weight,  # fp32 [T * H, N_SPLITS]
    out,  # [T, H, D], written here where there is one split
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
    B_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    N_SPLITS: tl.constexpr,
):
    """Grid (tiles of all requests, G, N_SPLITS)."""
    TOKENS: tl.constexpr = ROWS // GROUP
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens of a prompt see most keys: start with them
    g = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    b, tile = find_request(query_start_loc, n_requests, pid, TOKENS, 1, B_PAD)
    if b < 0:
        return
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    if tile * TOKENS >= n_new:
        return
    context_len = tl.load(context_lens + b)

    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    token = tile * TOKENS + r // GROUP  # among the new ones
    own_row = (r < TOKENS * GROUP) & (token < n_new)
    own = own_row[:, None] & (d < D)[None, :]
    row = (start + token).to(tl.int64)  # of query and out
    head = g * GROUP + r % GROUP
    q = tl.load(query + (row * query_stride_t + head * query_stride_h)[:, None] + d[None, :], mask=own, other=0.0)

    # Keys are numbered: cached tokens, then new ones up to the tile's last. A split takes a range of whole tiles.
    n_keys = context_len + tl.minimum((tile + 1) * TOKENS, n_new)
    first_key, stop_key = split_tokens(n_keys, split, N_SPLITS, TILE)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)

    table = block_table + b.to(tl.int64) * table_stride
    records += g * head_stride
    stop_cached = tl.minimum(stop_key, context_len)
    for first in range(first_key, stop_cached, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop_cached
        page = tl.load(table + t // N, mask=live, other=0).to(tl.int64)
        at = records + page * page_stride + t % N * (2 * D)
        k = tl.load(at[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(at[:, None] + (D + d)[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        top, total, acc = fold(q, k, v, live[None, :], top, total, acc, scale_log2, ROWS, TILE)

    key += start.to(tl.int64) * key_stride_t + g * key_stride_g
    value += start.to(tl.int64) * value_stride_t + g * value_stride_g
    stop_new = stop_key - context_len
    for first in range(tl.maximum(first_key - context_len, 0), stop_new, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop_new
        k_at = key + t.to(tl.int64) * key_stride_t
        v_at = value + t.to(tl.int64) * value_stride_t
        k = tl.load(k_at[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(v_at[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        visible = live[None, :] & (t[None, :] <= token[:, None])
        top, total, acc = fold(q, k, v, visible, top, total, acc, scale_log2, ROWS, TILE)

    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if N_SPLITS == 1:
        to = out + (row * out_stride_t + head * out_stride_h)[:, None] + d[None, :]
        tl.store(to, cast(y, out.dtype.element_ty), mask=own)
    else:
        at_split = (row * H + head) * N_SPLITS + split
        tl.store(weight + at_split, top + tl.log2(total), mask=own_row)
        tl.store(partial + at_split[:, None] * D + d[None, :], y, mask=own & (total > 0.0)[:, None])


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
) -> None:
    (n_tokens, n_heads, head_size), n_kv_heads = query.shape, key.shape[1]
    n_requests, group, block_size = query_start_loc.shape[0] - 1, n_heads // n_kv_heads, pages.layout.block_size
    if n_requests == 0 or n_tokens == 0:
        return
    n_rows, tile, n_warps = tile_sizes(head_size, query.dtype, group, n_tokens * group // n_requests)
    n_tiles = n_tokens // (n_rows // group) + n_requests
    max_tokens = block_table.shape[1] * block_size + n_tokens
    n_splits = split_count(n_tiles * n_kv_heads, max_tokens, query.device, min_tokens=1024)
    scratch = n_splits if n_splits > 1 else 0
    partial = torch.empty(n_tokens * n_heads, scratch, head_size, dtype=torch.float32, device=query.device)
    weight = torch.empty(n_tokens * n_heads, scratch, dtype=torch.float32, device=query.device)
    strides = [t.stride(i) for t in (query, key, value, pages.keys) for i in (0, 1)]
    prefill_kernel[(n_tiles, n_kv_heads, n_splits)](
        *(query, key, value, pages.keys, block_table, query_start_loc, context_lens, partial, weight, out),
        *(*strides, block_table.stride(0), out.stride(0), out.stride(1), scale * LOG2_E, n_requests),
        H=n_heads,
        GROUP=group,
        N=block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        B_PAD=triton.next_power_of_2(n_requests),
        ROWS=n_rows,
        TILE=tile,
        N_SPLITS=n_splits,
        num_warps=n_warps,
        num_stages=3,
    )
    if n_splits > 1:
        merge(partial, weight, out)


def tile_sizes(head_size: int, dtype: torch.dtype, group: int, rows_per_request: int) -> tuple[int, int, int]:
    """(query rows, keys, warps) of a tile: q, and two or three stages of K and V, stay within 160 KiB of shared memory.

    ``rows_per_request`` are the (token, head) pairs of a mean request: short steps get a small tile. fp32 has no tensor
    cores of its own precision, and keeps its operands in registers.
    """
    width = triton.next_power_of_2(head_size)
    if dtype == torch.float32:
        most, tile = 16, 16
    else:
        most, tile = (128, 64) if width <= 128 else (64, 32)
    n_rows = max(16, min(most, triton.next_power_of_2(rows_per_request)), triton.next_power_of_2(group))
    return n_rows, tile, 8 if n_rows >= 128 else 4
