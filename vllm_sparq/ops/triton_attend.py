"""Attention of one query group over tokens, split over them: the exact part of every decode op.

The tokens of a row are either all of a request, found through its block table, or a list of cells that `sparq_decode`
picked (a cell is ``page * N + slot``). One load leads from a token to its K and V, so the pipeliner can run ahead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages
from vllm_sparq.ops.triton_common import cast, dot, read_counts, split_count, split_tokens

LOG2_E = 1.4426950408889634


@triton.jit
def attend_kernel(
    query,  # [B, H, D]
    records,  # keys of the pages, [P, G, N, D]; the value of a token lies D elements behind its key
    tokens,  # LISTED: int32 cells [rows, capacity]; else the block table, int32 [B, M]
    seq_lens,  # int32 [B]
    partial,  # fp32 [B * H, N_SPLITS, D]
    weight,  # fp32 [B * H, N_SPLITS]
    out,  # [B, H, D], written here where there is one split
    query_stride_b,
    query_stride_h,
    page_stride,
    head_stride,
    tokens_stride,
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
    LISTED: tl.constexpr,
    MIN_K: tl.constexpr,
    K_NUM: tl.constexpr,
    K_DEN: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE_BELOW: tl.constexpr,
):
    """Grid (B * G, N_SPLITS). Reads 2 D elements per token, once for the whole query group."""
    row = tl.program_id(0)
    split = tl.program_id(1)
    b = (row // G).to(tl.int64)
    g = (row % G).to(tl.int64)
    n_tokens = tl.load(seq_lens + b)
    if LISTED:
        _, n_tokens, _ = read_counts(n_tokens, MIN_K, K_NUM, K_DEN, LOCAL, DENSE_BELOW)
        tokens += row.to(tl.int64) * tokens_stride
    else:
        tokens += b * tokens_stride
    start, stop = split_tokens(n_tokens, split, N_SPLITS, TILE)

    h = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    own = (h < GROUP)[:, None] & (d < D)[None, :]
    head = g * GROUP + h
    q = tl.load(query + b * query_stride_b + head[:, None] * query_stride_h + d[None, :], mask=own, other=0.0)
    records += g * head_stride

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    for first in range(start, stop, TILE):
        t = first + tl.arange(0, TILE)
        live = t < stop
        if LISTED:
            cell = tl.load(tokens + t, mask=live, other=0)
            page, slot = cell // N, cell % N
        else:
            page, slot = tl.load(tokens + t // N, mask=live, other=0), t % N
        at = records + page.to(tl.int64) * page_stride + slot * (2 * D)  # [TILE]
        k = tl.load(at[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)  # [D, TILE]
        s = dot(q, k, tl.zeros([GROUP_PAD, TILE], tl.float32)) * scale_log2
        s = tl.where(live[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(at[:, None] + (D + d)[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)  # [TILE, D]
        acc = dot(cast(p, v.dtype), v, acc * shrink[:, None])
        top = new_top

    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if N_SPLITS == 1:
        to = out + b * out_stride_b + head[:, None] * out_stride_h + d[None, :]
        tl.store(to, cast(y, out.dtype.element_ty), mask=own)
    else:
        at_split = (b * G * GROUP + head) * N_SPLITS + split
        tl.store(weight + at_split, top + tl.log2(total), mask=h < GROUP)
        tl.store(partial + at_split[:, None] * D + d[None, :], y, mask=own & (total > 0.0)[:, None])


def tile_tokens(head_size: int, dtype: torch.dtype) -> int:
    """Tokens of one step: 16 KiB of K, so that four programs with K and V twice fit an SM; fp32 lives in registers."""
    row_bytes = triton.next_power_of_2(head_size) * dtype.itemsize
    return max(16, (8192 if dtype == torch.float32 else 16384) // row_bytes)


def attend(
    query: torch.Tensor,
    pages: Pages,
    tokens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    max_tokens: int,
    read: dict[str, object] | None = None,
    keep_splits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Write ``out``, or return (partial, weight) for `merge` where rows are split or ``keep_splits``.

    ``tokens`` is the block table, or with ``read`` the list of cells; ``max_tokens`` bounds the tokens of a row.
    """
    (n_requests, n_heads, head_size), n_kv_heads = query.shape, pages.data.shape[1]
    keys, group = pages.keys, n_heads // n_kv_heads
    n_splits = split_count(n_requests * n_kv_heads, max_tokens, query.device, min_tokens=256)
    if keep_splits:
        n_splits = max(n_splits, 2)  # one split would be written to out
    scratch = n_splits if n_splits > 1 else 0
    partial = torch.empty(n_requests * n_heads, scratch, head_size, dtype=torch.float32, device=query.device)
    weight = torch.empty(n_requests * n_heads, scratch, dtype=torch.float32, device=query.device)
    unused = dict(MIN_K=1, K_NUM=0, K_DEN=1, LOCAL=0, DENSE_BELOW=0)
    attend_kernel[(n_requests * n_kv_heads, n_splits)](
        *(query, keys, tokens, seq_lens, partial, weight, out, query.stride(0), query.stride(1)),
        *(keys.stride(0), keys.stride(1), tokens.stride(0), out.stride(0), out.stride(1), scale * LOG2_E),
        G=n_kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        N=pages.layout.block_size,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        TILE=tile_tokens(head_size, query.dtype),
        N_SPLITS=n_splits,
        LISTED=read is not None,
        **(unused if read is None else read),
        num_warps=4,
        num_stages=3,
    )
    return (partial, weight) if n_splits > 1 else None
