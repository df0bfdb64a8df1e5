"""The specification of `vllm_sparq.ops.sparq_decode.sparq_decode`: one request and one KV head at a time."""

from __future__ import annotations

import torch

from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.codec import unpack
from vllm_sparq.ops.dense_decode.reference import add_scores, attend, capped, decode_rows, probabilities
from vllm_sparq.ops.write.reference import dequantize
from vllm_sparq.reads import SparqRead


def sparq_decode(
    query: torch.Tensor,
    pages: Pages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    read: SparqRead,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> None:
    for row in decode_rows(query, pages, block_table, seq_lens, out, sinks):
        q, keys, values = row.q, row.keys, row.values
        if read.is_dense(row.context_len):
            shares, _ = probabilities(capped(scale * q @ keys.T, soft_cap), row.sinks)
            row.out[:] = shares @ values
            add_scores(pages, row.blocks, row.head, shares)
            continue
        channels = pick_channels(q, read.r)
        scores = approximate_scores(q, ranking_keys(pages, row.blocks, keys, row.head), channels, scale)
        shares, of_sink = probabilities(capped(scores, soft_cap), row.sinks)
        add_scores(pages, row.blocks, row.head, shares)
        positions = positions_of(pages, row.blocks, row.context_len, row.head)
        tokens = pick_tokens(scores, read, positions, row.sinks, soft_cap)
        exact = attend(q, keys[tokens], values[tokens], scale, row.sinks, soft_cap)
        if read.alpha_floor < 1.0:
            alpha = (shares[:, tokens].sum(-1, keepdim=True) + of_sink).clamp(read.alpha_floor, 1.0)
            exact = alpha * exact + (1 - alpha) * mean_value(pages, row.blocks, values, row.head)
        row.out[:] = exact


def pick_channels(q: torch.Tensor, r: int) -> torch.Tensor:
    """Step 1: int64 [r] channels with the largest sum of |q| over the group q [H/G, D]."""
    return q.abs().sum(0).sort(descending=True, stable=True).indices[:r]


def approximate_scores(q: torch.Tensor, keys: torch.Tensor, channels: torch.Tensor, scale: float) -> torch.Tensor:
    """Step 2: fp32 [H/G, S] scores of every token from a few channels of q [H/G, D] and keys [S, D]."""
    coverage = q[:, channels].abs().sum(-1) / q.abs().sum(-1)
    coverage = torch.where(coverage > 0, coverage, 1.0)  # nothing of q on these channels: every score is zero anyway
    temperature = scale / coverage.sqrt()
    return (q[:, channels] * temperature[:, None]) @ keys[:, channels].T


def positions_of(pages: Pages, blocks: torch.Tensor, context_len: int, head: int) -> torch.Tensor:
    """int [S]: the position of the token in each slot, which is the slot where nothing is evicted."""
    slots = torch.arange(context_len, device=pages.data.device)
    if not pages.layout.positions:
        return slots
    return pages.positions[blocks.long()[slots // pages.layout.block_size], head, slots % pages.layout.block_size]


def pick_tokens(
    scores: torch.Tensor,
    read: SparqRead,
    positions: torch.Tensor,
    sinks: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Step 3: int64 slots for the whole group, best first, from its scores [H/G, S]; positions is int [S]."""
    context_len = scores.shape[1]
    shares, of_sink = probabilities(capped(scores, soft_cap), sinks)
    group = (scores if read.group_reduce == "logits" else shares).sum(0)
    group[positions > positions[-1] - read.n_local(context_len)] = torch.inf
    ranked = group.sort(descending=True, stable=True).indices[: read.n_selected(context_len)]
    if read.mass is None:
        return ranked
    held = of_sink.mean() + shares.mean(0)[ranked].cumsum(0)
    n_short = int((held < read.mass).sum())  # so many tokens hold less than is wanted; with one more they do not
    return ranked[: max(n_short + 1, read.n_least(context_len))]


def mean_value(pages: Pages, blocks: torch.Tensor, values: torch.Tensor, head: int) -> torch.Tensor:
    """Step 5: fp32 [D], the mean of all S values: what the last page's sum says, and the rows of that page."""
    context_len, block_size = values.shape[0], pages.layout.block_size
    last = (context_len - 1) // block_size
    rows = values[last * block_size :].sum(0)
    return (pages.value_sum[int(blocks[last]), head] + rows) / context_len


def ranking_keys(pages: Pages, blocks: torch.Tensor, keys: torch.Tensor, head: int) -> torch.Tensor:
    """fp32 [S, D] keys that rank the tokens: the ranking copy of full pages, K itself (``keys`` [S, D]) elsewhere.

    K itself is also what ranks where it is channel-major already, and in the newest block of quantized formats.
    """
    layout = pages.layout
    if layout.channel_keys:
        return keys
    n_full = (keys.shape[0] - (layout.quantized is not None)) // layout.block_size
    ranked = keys.clone()
    for i, page in enumerate(blocks[:n_full].tolist()):
        copy = pages.ranking[page, head]  # [D, N], or packed codes
        if layout.ranking != "model":
            copy = dequantize(unpack(copy, RANKING_BITS[str(layout.ranking)]), pages.scales[page, head])
        ranked[i * layout.block_size : (i + 1) * layout.block_size] = copy.float().T
    return ranked
