"""The sums of V of `vllm_sparq.ops.write.write` on a GPU: a launch of its own, once all tokens of the step are stored.

A page's sum needs the sum of the page before, which may get its own in the same step, from another request: where a
prompt begins like another one that arrives with it, vLLM lets both have the same blocks, and only one of them brings
the tokens. No program waits for another; whoever goes on from such a page walks back to a sum that is older than the
step, and adds the pages since.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common.attend import pages_as_records
from vllm_sparq.ops.triton_common.codes import codes_of
from vllm_sparq.ops.triton_common.launch import FIND_REQUESTS, step_kernel
from vllm_sparq.ops.triton_common.value_sums import SUM_CHANNELS, SUM_TILE, chain_sums


@triton.jit
def oldest_opened(block_table, query_start_loc, seq_lens, table, block, table_stride, n_requests, N: tl.constexpr):
    """The first block of ``table`` that gets its first token in this step, of those from which on all up to ``block``
    do; ``block`` itself may be such a block, the ones before it belong to other requests of the step."""
    looking = block > 0
    while looking:
        before = tl.load(table + block - 1)
        slot_0 = (block - 1) * N
        earliest = block
        for begin in range(0, n_requests, FIND_REQUESTS):
            r = begin + tl.arange(0, FIND_REQUESTS)
            live = r < n_requests
            stops = tl.load(seq_lens + r, mask=live, other=0)
            starts = tl.load(query_start_loc + r, mask=live, other=0)
            firsts = stops - (tl.load(query_start_loc + r + 1, mask=live, other=0) - starts)
            opens = live & (firsts <= slot_0) & (slot_0 < stops)
            theirs = tl.load(block_table + r.to(tl.int64) * table_stride + block - 1, mask=opens, other=-1)
            opened = tl.where(opens & (theirs == before), tl.cdiv(tl.maximum(firsts, 0), N), block)
            earliest = tl.minimum(earliest, tl.min(opened, 0))
        looking = (earliest < block) & (earliest > 0)
        block = earliest
    return block


@step_kernel
def open_sums_kernel(
    records,  # pages [P, G] of the model's type
    value_sum,  # fp32 [P, G, D]
    block_table,  # int32 [B, M]
    query_start_loc,
    seq_lens,
    page_stride,  # of records, in elements
    head_stride,
    sum_stride_p,
    sum_stride_g,
    table_stride,
    n_requests,
    FORMAT: tl.constexpr,  # None where V is stored in the model's type
    N: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
):
    """Grid (slices of the channels of all requests, G). In a decode step nearly all find nothing to open."""
    SLICES: tl.constexpr = (D + SUM_CHANNELS - 1) // SUM_CHANNELS
    b = tl.program_id(0) // SLICES
    g = tl.program_id(1).to(tl.int64)
    n_new = tl.load(query_start_loc + b + 1) - tl.load(query_start_loc + b)
    context_len = tl.load(seq_lens + b)
    opened = tl.cdiv(context_len - n_new, N)
    if (n_new <= 0) | (context_len < n_new) | (opened * N >= context_len):  # or a padding row of a decode batch
        return
    table = block_table + b.to(tl.int64) * table_stride
    start = oldest_opened(block_table, query_start_loc, seq_lens, table, opened, table_stride, n_requests, N)
    d = tl.program_id(0) % SLICES * SUM_CHANNELS + tl.arange(0, SUM_CHANNELS)
    stop = tl.cdiv(context_len, N)
    records += g * head_stride
    value_sum += g * sum_stride_g
    chain_sums(records, value_sum, table, d, start, opened, stop, page_stride, sum_stride_p, FORMAT, N, D, TILE)


def write_sums(pages: Pages, block_table: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """``value_sum`` of every page that gets its first token in the step, whose tokens are stored already."""
    layout, n_requests = pages.layout, query_start_loc.shape[0] - 1
    records, value_sum, head_size = pages_as_records(pages), pages.value_sum, layout.head_size
    open_sums_kernel[(n_requests * -(-head_size // SUM_CHANNELS), pages.data.shape[1])](
        *(records, value_sum, block_table, query_start_loc, seq_lens),
        *(records.stride(0), records.stride(1), value_sum.stride(0), value_sum.stride(1), block_table.stride(0)),
        n_requests,
        FORMAT=codes_of(layout),
        N=layout.block_size,
        D=head_size,
        TILE=SUM_TILE,
        SUM_CHANNELS=SUM_CHANNELS,
        num_warps=4,
    )
