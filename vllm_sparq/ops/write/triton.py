"""`vllm_sparq.ops.write.write` on a GPU: pages in the model's type (the others: `triton_quantized`).

One launch, and one more for the sums of V (`triton_sums`). A program copies the new tokens of one page and KV head, and
makes the ranking copy or the bounds if that completes the page; old tokens come from the page, new ones from ``key``.
Moves ``4 D`` elements per new token; a completed page its K twice, the second time from L1, and D / 2 bytes per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.triton_common.attention_scores import track_arrivals, tracked_parts
from vllm_sparq.ops.triton_common.launch import find_request, step_kernel
from vllm_sparq.ops.write.triton_quantized import write_quantized
from vllm_sparq.ops.write.triton_ranking import close_page, ranking_tile
from vllm_sparq.ops.write.triton_sums import write_sums


@step_kernel
def write_kernel(
    key,  # [T, G, D]
    value,
    records,  # keys of the pages [P, G, N, D]; V lies D elements after
    ranking,  # [P, G, D, N / 2 | N], or bounds [P, G, N / 16, 2, D]
    scales,  # fp16 [P, G, D, 2]
    positions,  # int32 [P, G, N]
    scores,  # fp32 [P, G, N]
    block_table,  # int32 [B, M]
    query_start_loc,
    seq_lens,
    first_positions,  # int32 [B] with SHIFTED
    key_stride_t,
    key_stride_g,
    value_stride_t,
    value_stride_g,
    page_stride,  # of records, in elements; the next lines alike for the other parts
    head_stride,
    ranking_stride_p,
    ranking_stride_g,
    scales_stride_p,
    scales_stride_g,
    tracked_stride_p,  # of positions and of scores
    tracked_stride_g,
    table_stride,
    n_requests,
    RANKING: tl.constexpr,
    POSITIONS: tl.constexpr,
    ATTENTION: tl.constexpr,
    SHIFTED: tl.constexpr,  # whether positions differ from slots
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    COPY_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (pages, G)."""
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    key += g * key_stride_g
    value += g * value_stride_g
    records += g * head_stride
    b, tile = find_request(query_start_loc, n_requests, pid, N, 2)
    if b < 0:
        return
    start = tl.load(query_start_loc + b)
    n_new = tl.load(query_start_loc + b + 1) - start
    context_len = tl.load(seq_lens + b)
    first = context_len - n_new
    block = first // N + tile
    if (n_new <= 0) | (first < 0) | (block * N >= context_len):  # first < 0: a padding row of a decode batch
        return
    page = tl.load(block_table + b.to(tl.int64) * table_stride + block).to(tl.int64)
    records += page * page_stride
    n_old = tl.maximum(first - block * N, 0)
    stop = tl.minimum(context_len - block * N, N)
    row = (start - first + block * N).to(tl.int64)  # of slot 0; before the tensor where that slot is old
    key += row * key_stride_t
    value += row * value_stride_t
    d = tl.arange(0, D_PAD)[None, :]
    for n in range(n_old, stop, COPY_TILE):
        slot = (n + tl.arange(0, COPY_TILE))[:, None]
        mask = (slot < stop) & (d < D)
        k = tl.load(key + slot.to(tl.int64) * key_stride_t + d, mask=mask)
        v = tl.load(value + slot.to(tl.int64) * value_stride_t + d, mask=mask)
        tl.store(records + slot * (2 * D) + d, k, mask=mask)
        tl.store(records + slot * (2 * D) + D + d, v, mask=mask)
    if POSITIONS:
        at = page * tracked_stride_p + g * tracked_stride_g
        slot_0 = block * N
        if SHIFTED:
            slot_0 += tl.load(first_positions + b) - first
        track_arrivals(positions + at, scores + at, slot_0, n_old, stop, ATTENTION)
    if RANKING is not None:  # noqa: SIM102  known at compile time, the rest is not
        if stop == N:
            ranking += page * ranking_stride_p + g * ranking_stride_g
            scales += page * scales_stride_p + g * scales_stride_g
            close_page(
                *(key, records, block_table, ranking, scales, n_old, key_stride_t, page_stride),
                *(RANKING, N, D, D_PAD, TILE, 0, None),
            )


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> None:
    layout, n_requests = pages.layout, query_start_loc.shape[0] - 1
    (n_tokens, n_kv_heads, head_size), block_size = key.shape, layout.block_size
    if n_requests == 0 or n_tokens == 0:
        return
    if layout.quantized is not None:
        write_quantized(key, value, pages, block_table, query_start_loc, seq_lens, first_positions)
        return
    # A part that the layout lacks is never touched: any pointer does.
    ranking = pages.ranking if layout.ranking else pages.data
    scales = pages.scales if layout.ranking in RANKING_BITS else pages.data
    d_pad = triton.next_power_of_2(head_size)
    strides = [t.stride(i) for t in (key, value, pages.keys, ranking, scales) for i in (0, 1)]
    positions, scores, *tracked_strides = tracked_parts(pages)
    shifted = layout.positions and first_positions is not None
    write_kernel[(n_tokens // block_size + 2 * n_requests, n_kv_heads)](
        *(key, value, pages.keys, ranking, scales, positions, scores),
        *(block_table, query_start_loc, seq_lens, first_positions if shifted else seq_lens),
        *(*strides, *tracked_strides, block_table.stride(0), n_requests),
        RANKING=layout.ranking,
        POSITIONS=layout.positions,
        ATTENTION=layout.attention,
        SHIFTED=shifted,
        N=block_size,
        D=head_size,
        D_PAD=d_pad,
        COPY_TILE=16,
        TILE=ranking_tile(block_size, d_pad),
        num_warps=4,
    )
    if layout.value_sum:
        write_sums(pages, block_table, query_start_loc, seq_lens)
