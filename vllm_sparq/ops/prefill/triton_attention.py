"""The attention that `prefill` pays to each token, on a GPU: its probabilities again, from K and the sums of before.

A program owns tiles of slots and walks the query rows that see their keys, so that every score is added to by one
program, in one order. That holds for a request in pieces too, which are several rows of the block table: the programs
of all its pieces share its tiles, and each goes through the pieces in turn. For a piece a program reads K once and the
queries once per tile; there is no tensor of rows by keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.attend import logits_of, pages_as_records
from vllm_sparq.ops.triton_common.codes import channel_order, codes_of, load_block_tile, load_records, tile_slots
from vllm_sparq.ops.triton_common.launch import FIND_REQUESTS, split_count, step_kernel


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
    k,  # [D_PAD, TILE], of so large units
    unit,
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
    CAP: tl.constexpr,
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
        s = logits_of(q, k, unit, visible, scale_log2, ROWS, TILE, CAP)
        base = merged_rows(weight, token.to(tl.int64) * H + head, own, n_splits, ROWS)
        total += tl.sum(tl.exp2(s - tl.where(own, base, 0.0)[:, None]), 0)
    return total


@triton.jit
def find_pieces(block_table, b, n_requests, table_stride):
    """The neighbours [start, stop) of row b in the block table that begin with the same page: pieces of its request."""
    start, stop = b * 0, b * 0 + n_requests
    for begin in range(1, n_requests, FIND_REQUESTS):
        index = begin + tl.arange(0, FIND_REQUESTS)
        inside = index < n_requests
        own = block_table + index.to(tl.int64) * table_stride
        page = tl.load(own, mask=inside, other=0)
        differs = inside & (page != tl.load(own - table_stride, mask=inside, other=0))
        start = tl.maximum(start, tl.max(tl.where(differs & (index <= b), index, 0), 0))
        stop = tl.minimum(stop, tl.min(tl.where(differs & (index > b), index, n_requests), 0))
    return start, stop


@triton.jit
def slots_of(first, stop, N: tl.constexpr, TILE: tl.constexpr, FORMAT: tl.constexpr):
    """int32 [TILE], the slots of the tile ``first``, the same whoever asks: as `load_block_tile` takes them."""
    if FORMAT is None:
        return first + tl.arange(0, TILE)
    else:
        block, in_block, _ = tile_slots(first, stop, N, FORMAT, TILE)
        return block * N + in_block


@triton.jit
def note_piece(
    query,  # pointer to the piece's first row and the group's first head
    weight,  # pointer alike
    key,  # pointer to the piece's first key, of this KV head
    records,
    scores,
    table,
    context_len,
    n_new,
    n_keys,
    mine,  # which of the programs that share the tiles this is
    n_programs,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    page_stride,
    scores_stride_p,
    scale_log2,
    n_splits,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    CAP: tl.constexpr,
):
    """Add what the rows of one piece pay to the keys in this program's tiles of slots."""
    d, in_key = channel_order(FORMAT, True, D, D_PAD)
    n_ahead = n_keys - n_new
    step = n_programs * TILE
    for first in range(mine * TILE, context_len, step):
        slot = slots_of(first, context_len, N, TILE, FORMAT)
        if FORMAT is None:
            live = slot < context_len
            page = tl.load(table + slot // N, mask=live, other=0).to(tl.int64)
            k, _ = load_records(records, page, slot % N, live, page_stride, D, D_PAD, FORMAT)
            unit = 1.0
        else:
            k, _, key_unit, _, live = load_block_tile(
                records, table, first, context_len, page_stride, N, D, D_PAD, TILE, FORMAT
            )
            unit = key_unit[None, :]
        paid = attention_of(
            *(query, weight, k, unit, tl.full([TILE], -1, tl.int32), live, 0, n_new, n_ahead),
            *(query_stride_t, query_stride_h, scale_log2, n_splits, H, GROUP, D, D_PAD, ROWS, TILE, FORMAT, CAP),
        )
        add_to_scores(scores, table, slot, live, paid, scores_stride_p, N, GROUP)

    begun = context_len // TILE  # the first tile with slots of new keys
    stop = tl.cdiv(context_len + n_keys, N) * N
    for first in range((begun + (mine + n_programs - begun % n_programs) % n_programs) * TILE, stop, step):
        slot = slots_of(first, stop, N, TILE, FORMAT)
        t = slot - context_len
        live = (t >= 0) & (t < n_keys)
        first_token = tl.maximum(tl.min(tl.where(live, t, n_keys), 0) - n_ahead, 0)
        k_at = key + t.to(tl.int64) * key_stride_t
        k = tl.load(k_at[None, :] + d[:, None], mask=live[None, :] & in_key[:, None], other=0.0)
        paid = attention_of(
            *(query, weight, k, 1.0, t, live, first_token, n_new, n_ahead),
            *(query_stride_t, query_stride_h, scale_log2, n_splits, H, GROUP, D, D_PAD, ROWS, TILE, FORMAT, CAP),
        )
        add_to_scores(scores, table, slot, live, paid, scores_stride_p, N, GROUP)


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
    n_requests,
    n_splits,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    CAP: tl.constexpr,
):
    """Grid (B * G, programs for a row). Those of all pieces of a request take the tiles of its slots in turns."""
    g = (tl.program_id(0) % G).to(tl.int64)
    H: tl.constexpr = G * GROUP
    start_piece, stop_piece = find_pieces(block_table, tl.program_id(0) // G, n_requests, table_stride)
    mine = (tl.program_id(0) // G - start_piece) * tl.num_programs(1) + tl.program_id(1)
    n_programs = (stop_piece - start_piece) * tl.num_programs(1)
    for b in range(start_piece, stop_piece):
        start = tl.load(query_start_loc + b)
        n_new = tl.load(query_start_loc + b + 1) - start
        if n_new > 0:
            row = start.to(tl.int64)
            key_start = tl.load(key_start_loc + b)
            note_piece(
                query + row * query_stride_t + g * GROUP * query_stride_h,
                weight + (row * H + g * GROUP) * n_splits,
                key + key_start.to(tl.int64) * key_stride_t + g * key_stride_g,
                *(
                    records + g * head_stride,
                    scores + g * scores_stride_g,
                    block_table + tl.cast(b, tl.int64) * table_stride,
                ),
                *(tl.load(context_lens + b), n_new, tl.load(key_start_loc + b + 1) - key_start, mine, n_programs),
                *(query_stride_t, query_stride_h, key_stride_t, page_stride, scores_stride_p, scale_log2, n_splits),
                *(H, GROUP, N, D, D_PAD, ROWS, TILE, FORMAT, CAP),
            )
        tl.debug_barrier()  # what one thread has added to, another may load for the next piece


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
    cap: float,
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
        *(*strides, block_table.stride(0), scale_log2, n_requests, weight.shape[1]),
        G=n_kv_heads,
        GROUP=query.shape[1] // n_kv_heads,
        N=layout.block_size,
        D=layout.head_size,
        D_PAD=triton.next_power_of_2(layout.head_size),
        ROWS=n_rows,
        TILE=tile,
        FORMAT=codes_of(layout),
        CAP=cap,
        num_warps=8 if layout.quantized is not None or n_rows >= 128 else 4,
        num_stages=2,
    )
