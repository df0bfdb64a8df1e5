"""What Triton kernels multiply: what quantized pages hold, rounded to the model's type but for whole numbers."""

from __future__ import annotations

import torch

from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.reference import add_scores, cached_tokens, capped, probabilities


def multiplied(layout: PageLayout, part: str, x: torch.Tensor) -> torch.Tensor:
    """fp32 of ``x``, the ``key`` or the ``value`` that pages hold, as kernels multiply it.

    Signed codes stay whole numbers, but in fp16; their scale is multiplied into what is fp32 then.
    """
    if layout.quantized is None or (layout.coding(part).scale_numbers == 1 and layout.dtype != torch.float16):
        return x.float()
    return x.to(layout.dtype).float()


def rounded_dense_decode(
    query: torch.Tensor,
    pages: Pages,
    table: torch.Tensor,
    lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    """`dense_decode` over K and V as kernels multiply them."""
    out.zero_()
    for b, s in enumerate(lens[: len(query)].tolist()):
        for head, heads in enumerate(query[b].unflatten(0, (pages.data.shape[1], -1)) if s else ()):
            cached = cached_tokens(pages, table[b], s, head)
            keys, values = (multiplied(pages.layout, *x) for x in zip(("key", "value"), cached, strict=True))
            own = slice(head * len(heads), (head + 1) * len(heads))
            logits = capped(scale * heads.float() @ keys.T, soft_cap)
            weights, _ = probabilities(logits, None if sinks is None else sinks[own])
            out[b, own] = weights @ values
            add_scores(pages, table[b], head, weights)
