"""Append new tokens to their pages."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_heads, check_starts, check_table, require
from vllm_sparq.ops.dispatch import choose


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_positions: torch.Tensor | None = None,
) -> None:
    """Append the new tokens of each request to its pages, and finish what a page owes at its first and last token.

    Request b brings rows ``query_start_loc[b] : query_start_loc[b + 1]``; its last new token goes into slot
    ``seq_lens[b] - 1``. For every page that a new token touches:

    * its K and V go into ``records``, or, in a quantized format, to where its block is staged;
    * where pages have them, the token's ``positions`` entry becomes its position and its ``attention`` entry 0;
    * when the page gets its first token (and only then), ``value_sum`` becomes the previous page's ``value_sum`` plus
      the sum of the previous page's V, in fp32; zero for the first page of a request;
    * when the page gets its last token, a quantized format makes its codes from the staged tokens
      (`vllm_sparq.ops.codec.quantize` says how); the staged tokens of a request's newest block stay, full or not;
    * when the page gets its last token, ``ranking`` codes and ``scales`` are made from the block's K, per channel:
      ``zero`` is the largest fp16 not above the least element, ``step`` the smallest fp16 not below
      ``(max - zero) / (2**bits - 1)``, ``code = clamp(round_half_even((x - zero) / step))`` in fp32, 0 where
      step is not positive (a constant channel). Elements that are not finite count as 0. ``zero`` and ``step``
      saturate at fp16's range.
    * when the page gets its last token, ``ranking`` of the kind ``bounds`` becomes, per span of 16 tokens and channel,
      the least and the largest element of the block's K, in the model's type and before anything is quantized.
      Elements that are not finite count as 0; a zero may have either sign. ``representatives`` are not its business,
      but that of `represent`.

    A request may go on from full blocks that another one brings in the same call, whichever comes first in the batch
    (with prefix caching, vLLM schedules equal beginnings so).

    Nothing else of any page changes: slots after the last token, and pages of other requests, keep their bytes. What
    staging blocks hold after the newest token is undefined.
    A position may be written again later (a rejected draft token): the page then pays its dues again. In a quantized
    format this holds for slots of the newest page that has not filled; otherwise a request may only grow.

    Args:
        key: [T, G, D], rotated as the model rotates.
        value: [T, G, D].
        pages: the cache; changed in place.
        block_table: int32 [B, M], page ids in token order; entries past a request's last block (and the staging blocks
            after it) are never read.
        query_start_loc: int32 [B + 1], ascending; rows from its last entry on are padding and ignored.
        seq_lens: int32 [B], context lengths S, new tokens included. A request may bring no token.
        first_positions: int32 [B] or None, the position of each request's first new token where that is not its slot,
            because tokens before it have been evicted.

    Raises:
        ValueError: a shape, type or stride that does not fit; the message names it.
    """
    check_heads("key", key, pages, multiple_of_kv_heads=False)
    check_heads("value", value, pages, multiple_of_kv_heads=False)
    require(key.shape == value.shape, f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape")
    n_requests = check_starts(query_start_loc)
    check_table(block_table, n_requests, seq_lens=seq_lens)
    if first_positions is not None:
        check_table(block_table, n_requests, first_positions=first_positions)
    run = choose("write", key.device.type).load()
    run(key, value, pages, block_table, query_start_loc, seq_lens, first_positions)
