"""Find the keys that stand for a span of tokens: those that the queries after it match best."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_starts, check_table, require
from vllm_sparq.ops.dispatch import OVERRIDE


def represent(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Representatives of spans, as InfLLM chooses them (Xiao et al. 2024, arXiv 2402.04617, section 3.2), per KV head.

    A token's representative score is its mean logit over the queries of its local window, those that come after it. A
    mean of dot products is a dot product with the mean, so what a span must know of queries is their sum. For each new
    token, in their order, with p its span of `SPAN_TOKENS` = 16 neighbours:

    1. *Sum*: the heads of the token's query group, summed one after the other, are added to the sum of span p, which
       starts at zero with the span's first token. fp32, so however a context is cut into steps, sums are the same bits.
    2. *Representatives*: when span p gets its last token, span s = p - `WINDOW_SPANS` has its window: the queries of
       spans s + 1 to p. The score of each of its tokens is ``K . sum of these sums``; a score that is not finite is the
       worst. The `REPRESENTATIVES` tokens with the largest scores (ties: oldest) represent the span, by the mean of
       their K (elements that are not finite count as 0). The mean takes both rows of the span's ``ranking``, in the
       model's type, where its sum has been until then: nobody needs it any longer.

    The paper's window begins after each token and its score takes one query head; here all tokens of a span share a
    window, and a query group a choice.

    Args:
        query: [T, H, D]; K of all rows is in the pages already.
        pages: the cache, with ``ranking`` of the kind ``representatives``; changed in place.
        block_table: int32 [>= B, M].
        query_start_loc: int32 [B + 1], ascending: request b owns rows ``[b] : [b + 1]``. A request may bring no token,
            and never brings one again.
        seq_lens: int32 [>= B], context lengths S, new tokens included.

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_heads("query", query, pages, multiple_of_kv_heads=True)
    require(
        pages.layout.ranking == "representatives",
        f"represent needs pages with ranking 'representatives'; this layout has {pages.layout.ranking!r}",
    )
    require(pages.layout.quantized is None, f"pages must be in the model's type, got format {pages.layout.format!r}")
    check_table(block_table, check_starts(query_start_loc), seq_lens=seq_lens)
    implementation()(query, pages, block_table, query_start_loc, seq_lens)


def query_sums(pages: Pages) -> torch.Tensor:
    """fp32 [P, G, N/16, D]: the sums of step 1, which lie where representatives will be."""
    return pages.ranking.flatten(-2).view(torch.float32)[..., : pages.layout.head_size]


def implementation() -> Callable[..., None]:
    """The function that runs; resolved once, when a layer is built. On CPU alone so far."""
    from vllm_sparq.ops import native
    from vllm_sparq.ops.represent import cpu, reference

    chosen: Callable[..., None] = reference.represent
    compiled = os.environ.get(OVERRIDE) != "reference" and native.find().library is not None
    return cpu.represent if compiled else chosen
