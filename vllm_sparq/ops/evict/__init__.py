"""Drop tokens that have had little attention, and close the gaps, so that whole blocks come free."""

from __future__ import annotations

from typing import get_args

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import check_table, require
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.retention import BY_ATTENTION, Rank


def evict(
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    kept_lens: torch.Tensor,
    recent_from: torch.Tensor,
    *,
    sinks: int,
    rank: Rank,
    most_kept: int | None = None,
) -> None:
    """Leave ``kept_lens[b]`` of the ``seq_lens[b]`` tokens of request b in each KV head, in its first slots.

    1. *Who stays*: tokens at positions below ``sinks`` and from ``recent_from[b]`` on, then those with the most
       attention (`Pages.attention`; NaN is least), or the newest where ``rank`` is ``age``. Ties: the lowest position.
    2. *Moves*: the survivors after slot ``kept_lens[b]``, in ascending order, take the slots of the dead before it, in
       ascending order. Other survivors stay where they are. K, V, position and score move together.
    3. *Pages*: whatever a page derives from its tokens is made again, as `write` makes it, where a token was replaced:
       the ranking copy of pages that are still full, and the value sums of all pages after.

    Quantized formats: ``kept_lens`` are multiples of the block size, or equal to ``seq_lens``. A moved token takes its
    codes along; from the newest block, which is staged, it is quantized on arrival. Where K is channel-major (KIVI) a
    group of tokens is quantized again as a whole if one of them was replaced, from what it stands for, rounded to the
    model's type; so is the ranking copy.

    The bytes after the kept slots are undefined afterwards. H2O (arXiv 2306.14048) with permanent eviction, per KV
    head at one budget; StreamingLLM's choice of tokens (arXiv 2309.17453), at their own positions.

    Args:
        pages: the cache, with positions; changed in place.
        block_table: int32 [>= B, M]; with the blocks of all ``seq_lens[b]`` tokens and their staging.
        seq_lens: int32 [B], slots taken.
        kept_lens: int32 [B], at most ``seq_lens``; a request that keeps all is left alone.
        recent_from: int32 [B], tokens at this position and after it always stay.
        sinks: first tokens of a request that always stay.
        rank: ``attention`` or ``age``: what decides among the others.
        most_kept: no request that loses tokens keeps more; known without asking the device, where scratch follows from
            it. None: what the block table holds.

    Raises:
        ValueError: a shape or type that does not fit, or pages that do not hold what tokens are ranked by.
    """
    require(pages.layout.positions, "evict needs pages with positions; this layout has none")
    require(rank in get_args(Rank), f"rank must be one of {list(get_args(Rank))}, got {rank!r}")
    require(
        pages.layout.attention or rank not in BY_ATTENTION,
        f"evict by rank={rank!r} needs pages that add it up; this layout does not, so use rank='age'",
    )
    check_table(block_table, seq_lens.shape[0], seq_lens=seq_lens, kept_lens=kept_lens, recent_from=recent_from)
    run = choose("evict", pages.data.device.type).load()
    run(pages, block_table, seq_lens, kept_lens, recent_from, sinks=sinks, rank=rank, most_kept=most_kept)
