"""`vllm_sparq.ops.restore.restore` on a GPU: a program for a tile of a block's tokens and a KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.attend import pages_as_records
from vllm_sparq.ops.triton_common.codes import channel_order, codes_of, load_block_tile, tile_slots
from vllm_sparq.ops.triton_common.launch import cast, step_kernel, widen

TILE = 32
"""Tokens of a program, which holds their K and V in registers."""


@step_kernel
def restore_kernel(
    records,  # pages [P, G], by the model's type
    block_table,
    n_blocks,  # int32 [B]
    first_pages,  # int32 [B]
    keys,  # [P', N, G, D] of the model's type
    values,
    page_stride,
    head_stride,
    table_stride,
    key_stride_p,
    key_stride_n,
    key_stride_g,
    value_stride_p,
    value_stride_n,
    value_stride_g,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Grid (tiles of the longest request, G, B)."""
    tile, g, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, stop = tile * TILE, tl.load(n_blocks + b) * N
    if first >= stop:
        return
    table = block_table + b * table_stride
    k, v, key_unit, value_unit, live = load_block_tile(
        records + g * head_stride, table, first, stop, page_stride, N, D, D_PAD, TILE, FORMAT
    )
    block, slot, _ = tile_slots(first, stop, N, FORMAT, TILE)
    page = (tl.load(first_pages + b) + block).to(tl.int64)
    d_key, in_key = channel_order(FORMAT, True, D, D_PAD)
    d_value, in_value = channel_order(FORMAT, False, D, D_PAD)
    k = cast(widen(tl.trans(k)) * key_unit[:, None], keys.dtype.element_ty)
    v = cast(widen(v) * value_unit[:, None], values.dtype.element_ty)
    key_at = keys + page * key_stride_p + slot * key_stride_n + g * key_stride_g
    value_at = values + page * value_stride_p + slot * value_stride_n + g * value_stride_g
    tl.store(key_at[:, None] + d_key[None, :], k, mask=live[:, None] & in_key[None, :])
    tl.store(value_at[:, None] + d_value[None, :], v, mask=live[:, None] & in_value[None, :])


def restore(
    pages: Pages,
    block_table: torch.Tensor,
    n_blocks: torch.Tensor,
    first_pages: torch.Tensor,
    *,
    most_blocks: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    layout, n_requests = pages.layout, n_blocks.shape[0]
    if n_requests == 0 or most_blocks == 0:
        return
    records, n = pages_as_records(pages), layout.block_size
    strides = [tensor.stride(i) for tensor in (keys, values) for i in (0, 1, 2)]
    restore_kernel[(triton.cdiv(most_blocks * n, TILE), pages.data.shape[1], n_requests)](
        *(records, block_table, n_blocks, first_pages, keys, values),
        *(records.stride(0), records.stride(1), block_table.stride(0), *strides),
        N=n,
        D=layout.head_size,
        D_PAD=triton.next_power_of_2(layout.head_size),
        TILE=TILE,
        FORMAT=codes_of(layout),
        num_warps=4,
    )
