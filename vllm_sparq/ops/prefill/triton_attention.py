"""The attention that `prefill` pays to each token, on a GPU: its probabilities again, from K and the sums of before.

A program owns a tile of keys and walks the query rows that see it, so that every score is added to by one program. It
reads K once and the queries once per tile of keys; there is no tensor of rows by keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.attend import logits_of, pages_as_records
from vllm_sparq.ops.triton_common.codes import channel_order, codes_of, load_block_tile, load_records, tile_slots
from vllm_sparq.ops.triton_common.launch import split_count, step_kernel


@triton.jit
def merged_rows(weight, row, live, n_splits, ROWS: tl.constexpr):
    """fp32 [ROWS], log2 of each row's sum of exponentials over all splits; infinity for rows that are not live."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(n_splits):
        top = tl.maximum(top, tl.load(weight + row * n_splits + split, mask=live, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    for split in range(n_splits):
        total += tl.exp2(tl.load(weight + row * n_splits + split, mask=live, other=0.0) - top)
    return tl.where(live, top + tl.log2(total), float("inf"))


@triton.jit
def attention_of(
    query,  # pointer to the request's first row and the group's first head
    weight,  # pointer alike
    k,  # [D_PAD, TILE]
    t,  # [TILE], among the request's keys that come with the step; negative for cached tokens, which all rows see
    live,
    first_token,  # the first of the new tokens that sees any of the keys
    n_new,
    n_ahead,
    query_stride_t,
    query_stride_h,
    scale_log2,
    n_splits,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """fp32 [TILE], the probabilities of a tile of keys, summed over the new tokens and the query group."""
    TOKENS: tl.constexpr = ROWS // GROUP
    r = tl.arange(0, ROWS)
    d, in_key = channel_order(FORMAT, True, D, D_PAD)
    total = tl.zeros([TILE], tl.float32)
    for first in range(first_token, n_new, TOKENS):
        token = first + r // GROUP
        own = (r < TOKENS * GROUP) & (token < n_new)
        head = r % GROUP
        q_at = query + (token.to(tl.int64) * query_stride_t + head * query_stride_h)[:, None] + d[None, :]
        q = tl.load(q_at, mask=own[:, None] & in_key[None, :], other=0.0)
        visible = own[:, None] & live[None, :] & (t[None, :] <= (n_ahead + token)[:, None])
        s = logits_of(q, k, visible, scale_log2, ROWS, TILE)
        base = merged_rows(weight, token.to(tl.int64) * H + head, own, n_splits, ROWS)
        total += tl.sum(tl.exp2(s - tl.where(own, base, 0.0)[:, None]), 0)
    return total


@step_kernel
def note_prefill_kernel(
    query,  # [T, H, D]
    key,  # [T', G, D]
    records,  # pages [P, G] in the model's type
    scores,  # fp32 [P, G, N]
    block_table,
    query_start_loc,
    key_start_loc,
    context_lens,
    weight,  # fp32 [T * H, n_splits], log2 of sums of exponentials
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_g,
    page_stride,
    head_stride,
    scores_stride_p,
    scores_stride_g,
    table_stride,
    scale_log2,
    n_splits,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Grid (B * G, programs that take the tiles of keys in turns)."""
    b = (tl.program_id(0) // G).to(tl.int64)
    g = (tl.program_id(0) % G).to(tl.int64)
    H: tl.constexpr = G * GROUP
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    if n_new <= 0:
        return
    context_len = tl.load(context_lens + b)
    key_start = tl.load(key_start_loc + b)
    n_keys = tl.load(key_start_loc + b + 1) - key_start
    n_ahead = n_keys - n_new
    table = block_table + b * table_stride
    records += g * head_stride
    scores += g * scores_stride_g
    query += start.to(tl.int64) * query_stride_t + g * GROUP * query_stride_h
    weight += (start.to(tl.int64) * H + g * GROUP) * n_splits
    key += key_start.to(tl.int64) * key_stride_t + g * key_stride_g
    d, in_key = channel_order(FORMAT, True, D, D_PAD)

    step = tl.num_programs(1) * TILE
    for first in range(tl.program_id(1) * TILE, context_len, step):
        if FORMAT is None:
            slot = first + tl.arange(0, TILE)
            live = slot < context_len
            page = tl.load(table + slot // N, mask=live, other=0).to(tl.int64)
            k, _ = load_records(records, page, slot % N, live, page_stride, D, D_PAD, FORMAT)
        else:
            block, in_block, _ = tile_slots(first, context_len, N, FORMAT, TILE)
            slot = block * N + in_block
            k, _, live = load_block_tile(records, table, first, context_len, page_stride, N, D, D_PAD, TILE, FORMAT)
        paid = attention_of(
            *(query, weight, k, tl.full([TILE], -1, tl.int32), live, 0, n_new, n_ahead),
            *(query_stride_t, query_stride_h, scale_log2, n_splits, H, GROUP, D, D_PAD, ROWS, TILE, FORMAT),
        )
        add_to_scores(scores, table, slot, live, paid, scores_stride_p, N, GROUP)
    for first in range(tl.program_id(1) * TILE, n_keys, step):
        t = first + tl.arange(0, TILE)
        live = t < n_keys
        k_at = key + t.to(tl.int64) * key_stride_t
        k = tl.load(k_at[None, :] + d[:, None], mask=live[None, :] & in_key[:, None], other=0.0)
        paid = attention_of(
            *(query, weight, k, t, live, tl.maximum(first - n_ahead, 0), n_new, n_ahead),
            *(query_stride_t, query_stride_h, scale_log2, n_splits, H, GROUP, D, D_PAD, ROWS, TILE, FORMAT),
        )
        add_to_scores(scores, table, context_len + t, live, paid, scores_stride_p, N, GROUP)


@triton.jit
def add_to_scores(scores, table, slot, live, paid, scores_stride_p, N: tl.constexpr, GROUP: tl.constexpr):
    """Add the mean over the query group to the scores of a request's slots."""
    page = tl.load(table + slot // N, mask=live, other=0).to(tl.int64)
    at = scores + page * scores_stride_p + slot % N
    tl.store(at, tl.load(at, mask=live, other=0.0) + paid / GROUP, mask=live)


def add_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    weight: torch.Tensor,
    scale_log2: float,
    n_rows: int,
    tile: int,
) -> None:
    """Add to `Pages.attention`; ``n_rows`` query rows by ``tile`` keys at a time."""
    n_requests, n_kv_heads, layout = query_start_loc.shape[0] - 1, key.shape[1], pages.layout
    records, scores = pages_as_records(pages), pages.attention
    max_tokens = block_table.shape[1] * layout.block_size
    strides = [t.stride(i) for t in (query, key, records, scores) for i in (0, 1)]
    n_programs = split_count(n_requests * n_kv_heads, max_tokens, query.device, min_tokens=tile, limit=1024)
    note_prefill_kernel[(n_requests * n_kv_heads, n_programs)](
        *(query, key, records, scores, block_table, query_start_loc, key_start_loc, context_lens, weight),
        *(*strides, block_table.stride(0), scale_log2, weight.shape[1]),
        G=n_kv_heads,
        GROUP=query.shape[1] // n_kv_heads,
        N=layout.block_size,
        D=layout.head_size,
        D_PAD=triton.next_power_of_2(layout.head_size),
        ROWS=n_rows,
        TILE=tile,
        FORMAT=codes_of(layout),
        num_warps=8 if layout.quantized is not None or n_rows >= 128 else 4,
        num_stages=2,
    )
