"""The reference over what quantized pages hold, rounded to the model's type: what Triton kernels multiply."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import add_scores, cached_tokens, capped, probabilities


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
    """`dense_decode` over K and V as the pages hold them, in the model's type."""
    out.zero_()
    for b, s in enumerate(lens[: len(query)].tolist()):
        for head, heads in enumerate(query[b].unflatten(0, (pages.data.shape[1], -1)) if s else ()):
            keys, values = (x.to(out.dtype).float() for x in cached_tokens(pages, table[b], s, head))
            own = slice(head * len(heads), (head + 1) * len(heads))
            logits = capped(scale * heads.float() @ keys.T, soft_cap)
            weights, _ = probabilities(logits, None if sinks is None else sinks[own])
            out[b, own] = weights @ values
            add_scores(pages, table[b], head, weights)
