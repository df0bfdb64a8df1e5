"""`vllm_sparq.ops.turned_attention.turned_attention` on CPU.

Requests of a row each, which decode and come first, in C++: csrc/turned_decode.cpp. Those that bring several in torch,
all rows and heads of a request at a time.
"""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops import native


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
    n_kv_heads, block_size = pages.data.shape[1], pages.layout.block_size
    starts = query_start_loc.tolist()
    n_single = _leading_single_rows(starts) if native.find().library is not None else 0
    if n_single:
        dense = turned.contiguous().flatten(1, 2)  # outlives the call: C++ gets its address
        native.function("sparq_turned_decode")(
            native.pages_struct(pages),
            native.tensor(query),
            native.tensor(dense),
            native.tensor(out),
            native.requests(block_table, seq_lens, n_single),
            native.logits(scale, sinks, soft_cap),
        )
    for b, n_slots in enumerate(seq_lens[n_single : len(starts) - 1].tolist(), start=n_single):
        rows = slice(starts[b], starts[b + 1])
        n_rows = rows.stop - rows.start
        if n_slots == 0 or n_rows == 0:
            continue
        pages_of = block_table[b, : -(-n_slots // block_size)].long()
        keys, values = (  # [G, S, D]
            part[pages_of].transpose(0, 1).flatten(1, 2)[:, :n_slots].float() for part in (pages.keys, pages.values)
        )
        q = query[rows].float().unflatten(1, (n_kv_heads, -1)).permute(1, 2, 0, 3)  # [G, H/G, T', D]
        logits = q @ keys[:, None].transpose(-1, -2)  # [G, H/G, T', S]
        few = keys[:, : turned.shape[1]]
        of_slots = turned[rows, : few.shape[1]].unflatten(2, (n_kv_heads, -1))  # [T', n, G, H/G, D]
        logits[..., : few.shape[1]] = torch.einsum("tnghd,gnd->ghtn", of_slots, few)
        logits *= scale
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        if n_rows > 1:
            unseen = torch.ones(n_rows, n_rows, dtype=torch.bool).triu(1)
            logits[..., n_slots - n_rows :].masked_fill_(unseen, -torch.inf)
        found = _weights(logits, sinks) @ values[:, None]
        out[rows] = found.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def _leading_single_rows(starts: list[int]) -> int:
    """Requests before the first that brings no row, or several; ``starts`` [B + 1]."""
    n = 0
    while n + 1 < len(starts) and starts[n] == n and starts[n + 1] == n + 1:
        n += 1
    return n


def _weights(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of logits [G, H/G, T', S], over one more logit of each head [H] where there are learned sinks."""
    if sinks is None:
        return logits.softmax(-1)
    own = sinks.view(*logits.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([own, logits], -1).softmax(-1)[..., 1:]
