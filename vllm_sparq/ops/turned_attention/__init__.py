"""Attention of new tokens over their pages, whose first slots are seen by a query of their own."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_softmax, check_starts, check_table, require
from vllm_sparq.ops.dispatch import OVERRIDE


def turned_attention(
    query: torch.Tensor,
    turned: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """Row i of request b sees the slots up to its own, the first n of them by ``turned[i]`` instead of ``query[i]``.

    Keys are cached rotated to their positions. Rotations compose: a query that is turned by the difference sees a key
    at any distance, and there are few first tokens (StreamingLLM, arXiv 2309.17453; LM-Infinite, arXiv 2308.16137).
    For requests that keep few tokens: scores of all rows of a request are there at once, unless it brings one. CPU
    alone: requests that bring a row each, the first of a step, in C++, others in torch.

    Args:
        query: [T, H, D]; K and V of all rows are in the pages already.
        turned: fp32 [T, n, H, D], the query that sees slot j: ``turned[:, j]``.
        pages: the cache, in the model's type; not one that adds up attention.
        block_table: int32 [>= B, M].
        query_start_loc: int32 [B + 1], ascending: request b owns rows ``[b] : [b + 1]``, the last of its slots. Rows
            outside every request are padding, and so is a request without slots: their output is undefined.
        seq_lens: int32 [>= B], slots taken, those of the rows included.
        scale: of the logits, normally 1 / sqrt(D).
        out: [T, H, D], written. Sums are fp32, rounded once at the end.
        sinks, soft_cap: as in `dense_decode`; what a learned sink holds is no slot.

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_heads("query", query, pages, multiple_of_kv_heads=True)
    check_heads("out", out, pages, multiple_of_kv_heads=True)
    require(out.shape == query.shape, f"out must be {tuple(query.shape)} like query, got {tuple(out.shape)}")
    require(pages.layout.quantized is None, f"pages must be in the model's type, got format {pages.layout.format!r}")
    require("attention" not in pages.layout.parts, "pages must not add up attention: nothing is added to it here")
    require(
        turned.dtype == torch.float32 and turned.dim() == 4 and (len(turned), *turned.shape[2:]) == query.shape,
        f"turned must be float32 [{query.shape[0]}, n, {query.shape[1]}, {query.shape[2]}], got "
        f"{turned.dtype} {tuple(turned.shape)}",
    )
    check_table(block_table, check_starts(query_start_loc), seq_lens=seq_lens)
    check_softmax(query, sinks, soft_cap)
    tables = block_table, query_start_loc, seq_lens
    implementation()(query, turned, pages, *tables, scale=scale, out=out, sinks=sinks, soft_cap=soft_cap)


def implementation() -> Callable[..., None]:
    """The function that runs; resolved once, when a layer is built."""
    from vllm_sparq.ops.turned_attention import cpu, reference

    chosen: Callable[..., None] = reference.turned_attention
    return chosen if os.environ.get(OVERRIDE) == "reference" else cpu.turned_attention
