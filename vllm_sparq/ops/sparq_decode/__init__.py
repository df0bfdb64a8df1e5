"""SparQ attention of one new token per request: rank all tokens cheaply, read few of them."""

from __future__ import annotations

import torch

from vllm_sparq.layout import Pages
from vllm_sparq.ops.checks import require
from vllm_sparq.ops.dense_decode import check_decode
from vllm_sparq.ops.dispatch import choose
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
    """SparQ attention (Ribar et al. 2023, arXiv 2312.04985), per request b and KV head, q the heads of its query group.

    A request that ``read.is_dense`` is attended to densely, exactly as `dense_decode` does. Otherwise:

    1. *Channels*: the ``read.r`` channels with the largest sum of ``|q|`` over the group (ties: lowest channel).
    2. *Scores*: ``s_g = scale_g * q_g[channels] K[channels]^T`` for every cached token, with the temperature
       ``scale_g = scale * sqrt(|q_g|_1 / |q_g[channels]|_1)`` of each query head (1-norms; ``scale`` where the chosen
       channels hold nothing of q_g). K is the page's ranking copy in full pages, and K itself in the unfinished one.
       In quantized formats the newest block, staged, counts as unfinished; where K is channel-major (KIVI) it ranks the
       tokens as it is stored, and there is no copy.
    3. *Tokens*: the ``n_selected(S)`` with the largest summed score over the group (``group_reduce: logits``) or summed
       softmax of the scores (``probs``); the ``n_local(S)`` newest are always among them (ties: oldest token).
       With ``read.mass`` only the first of them, the newest before all others: as few as hold this share of the mean
       over the group of ``softmax(s_g)`` over all S tokens, but no fewer than ``n_least(S)``.
    4. *Exact part*: ``y_g``, softmax attention with ``scale`` and all D channels over those tokens.
    5. *Mean value*: ``alpha_g`` is the share of ``softmax(s_g)`` on those tokens, not less than ``read.alpha_floor``;
       ``out_g = alpha_g y_g + (1 - alpha_g) v`` with v the mean of V over all S tokens, from the page sums.

    Where tokens may have been evicted (pages with ``positions``) the *newest* tokens are those whose positions are less
    than ``n_local(S)`` below the last token's, and v is the mean over the tokens that remain. Where pages have
    ``attention``, the mean over the query group of ``softmax(s_g)`` is added to each token's entry; of a context that
    is read densely, its probability.

    With ``alpha_floor = 1`` step 5 is ``out_g = y_g`` and needs no page sums.

    Args:
        query: [B, H, D], one row per request; its own K and V are already in the pages.
        pages: the cache, with a ranking copy or channel-major K, and with value sums unless ``read.alpha_floor`` is 1.
        block_table: int32 [>= B, M]; entries past a request's last block, and its staging blocks, are never read.
        seq_lens: int32 [>= B], context lengths S, the current token included. A row with S = 0 (padding) is zero.
        read: what to read, resolved for the model.
        scale: of the exact logits, normally 1 / sqrt(D).
        out: [B, H, D], written.
        sinks: fp32 [H] or None, as in `dense_decode`: one more token that is always read, with its own logit as its
            score. It is in both softmaxes, and alpha and what is held of ``read.mass`` include its share; v does not.
        soft_cap: None, or as in `dense_decode`, of scores wherever they become probabilities; their sum over the group
            ranks tokens as it is (for one head that is the same order).

    Raises:
        ValueError: a shape, type or stride that does not fit, or pages without the parts that ``read`` needs.
    """
    check_decode(query, pages, block_table, seq_lens, out, sinks, soft_cap)
    require(pages.layout.ranks_tokens, "sparq_decode needs pages with a ranking copy of K; this layout has none")
    require(
        pages.layout.value_sum or read.alpha_floor >= 1.0,
        f"alpha_floor={read.alpha_floor} needs pages with value sums; this layout has none",
    )
    require(read.mass is None or 0 < read.mass < 1, f"mass={read.mass} must be above 0 and below 1, or None")
    require(1 <= read.r <= pages.layout.head_size, f"r={read.r} must be 1 to the head size {pages.layout.head_size}")
    run = choose("sparq_decode", query.device.type).load()
    run(query, pages, block_table, seq_lens, read=read, scale=scale, out=out, sinks=sinks, soft_cap=soft_cap)
