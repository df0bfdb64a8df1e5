"""What the Triton kernels write beside K and V where tokens may be evicted: positions, and the attention tokens get."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparq.layout import Pages


def note_parts(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Positions and scores [P, G, N], and the strides of both in elements (of pages, of KV heads).

    A part that the layout lacks is never touched: any pointer does.
    """
    if not pages.layout.positions:
        return pages.data, pages.data, 0, 0
    positions = pages.positions
    scores = pages.scores if pages.layout.scores else pages.data
    return positions, scores, positions.stride(0), positions.stride(1)


@triton.jit
def note_arrivals(positions, scores, slot_0, n_old, stop, SCORES: tl.constexpr):
    """Tokens arrived in the slots ``n_old : stop`` of a page and KV head; a token in slot 0 has position ``slot_0``."""
    for n in range(n_old, stop, 64):
        slot = n + tl.arange(0, 64)
        tl.store(positions + slot, slot_0 + slot, mask=slot < stop)
        if SCORES:
            tl.store(scores + slot, tl.zeros([64], tl.float32), mask=slot < stop)
