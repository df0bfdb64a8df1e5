"""An independent oracle: SparQ written a second time, from the papers' definitions, in numpy and float64.

It shares no code with the package. Two formulations: `repository` (the authors' code base, our specification) and
`paper` (the listing in the paper's appendix, for grouped queries), which differ in how tokens are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.ops.cases import Case, Tokens
from vllm_sparq.reads import SparqRead

Array = np.ndarray


@dataclass(frozen=True)
class Trace:
    """One KV head of one request, everything that a SparQ read decides on the way.

    Attributes:
        channels: [r], descending magnitude.
        scores: [H', S], approximate logits of each query head.
        rank_by: [S], what tokens are chosen by, before the local window is forced in.
        chosen: [n], ascending positions.
        exact: [H', D], attention over the chosen tokens.
        alpha: [H'].
        mean: [D].
    """

    channels: Array
    scores: Array
    rank_by: Array
    chosen: Array
    exact: Array
    alpha: Array
    mean: Array

    @property
    def out(self) -> Array:
        weight = self.alpha[:, None]
        return weight * self.exact + (1 - weight) * self.mean


def probabilities(logits: Array, sinks: Array | None = None) -> Array:
    """Of the tokens [H', S]; sinks [H'] are one more logit a head."""
    own = logits if sinks is None else np.concatenate([logits, sinks[:, None]], 1)
    shifted = np.exp(own - own.max(-1, keepdims=True))
    return (shifted / shifted.sum(-1, keepdims=True))[..., : logits.shape[-1]]


def capped(logits: Array, soft_cap: float | None) -> Array:
    return logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)


def largest(x: Array, n: int) -> Array:
    """Indices of the ``n`` largest, the earlier one first among equals."""
    return np.lexsort((np.arange(len(x)), -x))[:n]


def approximate(query: Array, rank_keys: Array, r: int, scale: float) -> tuple[Array, Array]:
    """Channels, and the scores [H', S] that the paper's temperature makes of them.

    The paper divides by ``sqrt(D * coverage)`` where coverage is the share of |q|_1 that the channels hold; dividing by
    sqrt(D) is multiplying by ``scale``. A head with nothing on the channels scores every token 0 at any temperature.
    """
    channels = largest(np.abs(query).sum(0), r)
    narrow = query[:, channels]
    total, held = np.abs(query).sum(1), np.abs(narrow).sum(1)
    coverage = np.divide(held, total, out=np.ones_like(held), where=held > 0)
    return channels, scale / np.sqrt(coverage)[:, None] * np.einsum("hr,sr->hs", narrow, rank_keys[:, channels])


def finish(
    query: Array,
    keys: Array,
    values: Array,
    scores: Array,
    chosen: Array,
    scale: float,
    floor: float,
    sinks: Array | None = None,
    soft_cap: float | None = None,
) -> tuple[Array, Array, Array]:
    """Exact part, alpha and mean for the ``chosen`` tokens: what is left out pays for the mean."""
    exact = probabilities(capped(scale * query @ keys[chosen].T, soft_cap), sinks) @ values[chosen]
    left = np.setdiff1d(np.arange(len(keys)), chosen)
    alpha = np.maximum(1 - probabilities(capped(scores, soft_cap), sinks)[:, left].sum(1), floor)
    return exact, alpha, values.mean(0)


def repository(
    query: Array,
    rank_keys: Array,
    keys: Array,
    values: Array,
    *,
    r: int,
    n_selected: int,
    n_local: int,
    scale: float,
    floor: float = 0.0,
    reduce: str = "logits",
    mass: float = 1.0,
    n_least: int = 0,
    chosen: Array | None = None,
    sinks: Array | None = None,
    soft_cap: float | None = None,
) -> Trace:
    """Query [H', D] of one group, keys and values [S, D]; ``chosen`` overrides step 3.

    Below a ``mass`` of 1 the tokens are taken one by one until they hold so much and are ``n_least``; what ``sinks``
    hold counts as held. A ``soft_cap`` is on what becomes a probability.
    """
    channels, scores = approximate(query, rank_keys, r, scale)
    rank_by = (scores if reduce == "logits" else probabilities(capped(scores, soft_cap), sinks)).sum(0)
    if chosen is None:
        forced = rank_by.copy()
        forced[len(forced) - n_local :] = np.inf
        taken: list[int] = []
        for token in largest(forced, n_selected):
            shares = probabilities(capped(scores, soft_cap), sinks)
            held = 1 - shares.mean(0).sum() + shares.mean(0)[taken].sum()
            if mass < 1 and len(taken) >= n_least and held >= mass:
                break
            taken.append(token)
        chosen = np.sort(taken)
    exact, alpha, mean = finish(query, keys, values, scores, chosen, scale, floor, sinks, soft_cap)
    return Trace(channels, scores, rank_by, chosen, exact, alpha, mean)


def paper(query: Array, keys: Array, values: Array, *, r: int, k: int) -> Array:
    """The listing of the paper: summed probabilities, no local window, k tokens with the current one among them."""
    n_heads, head_size = query.shape
    order = np.argsort(-np.abs(query).sum(axis=0), kind="stable")
    mask = np.zeros(head_size, dtype=bool)
    mask[order[:r]] = True
    q_hat = np.where(mask, query, 0.0)  # whole tensors with zeros, where `approximate` gathers
    out = np.empty_like(query)
    s_hat = np.empty((n_heads, len(keys)))
    for h in range(n_heads):
        temperature = np.sqrt(head_size * np.linalg.norm(q_hat[h], 1) / np.linalg.norm(query[h], 1))
        weights = np.exp(keys @ q_hat[h] / temperature)
        s_hat[h] = weights / weights.sum()
    best = np.argsort(-s_hat.sum(axis=0), kind="stable")[:k]
    for h in range(n_heads):
        weights = np.exp(keys[best] @ query[h] / np.sqrt(head_size))
        alpha = s_hat[h, best].sum()
        out[h] = alpha * (weights[:, None] * values[best]).sum(0) / weights.sum() + (1 - alpha) * values.mean(0)
    return out


def numbers(read: SparqRead, context_len: int, head_size: int) -> dict[str, object]:
    """What `repository` takes, from the definition of the options and not from `SparqRead`'s own arithmetic."""
    k = max(read.min_k, int(Fraction(context_len) * read.k_per_token))
    local = k // 4 if read.local is None else min(read.local, k)
    return {
        "r": read.r,
        "n_selected": min(context_len, k + 1),
        "n_local": min(context_len, local + 1),
        "mass": 1.0 if read.mass is None else read.mass,
        "n_least": min(context_len, max(local, min(read.least_k, k)) + 1),
        "scale": head_size**-0.5,
        "floor": read.alpha_floor,
        "reduce": read.group_reduce,
    }


def sinks_of(case: Case, heads: slice) -> Array | None:
    sinks = case.sink_logits()
    return None if sinks is None else sinks[heads].double().numpy()


def expected(case: Case, tokens: Tokens, read: SparqRead) -> Array:
    """[B, H, D] by the oracle from the tokens themselves (ranking ``model``)."""
    group = case.heads // case.kv_heads
    out = np.zeros((len(case.lens), case.heads, case.head_size))
    for b, s in enumerate(case.lens):
        if s == 0:
            continue
        query = tokens.query[b][0].double().numpy()
        for g in range(case.kv_heads):
            heads = slice(g * group, (g + 1) * group)
            key, value = (x[b][:, g].double().numpy() for x in (tokens.key, tokens.value))
            if s < read.dense_below:
                logits = capped(case.scale * query[heads] @ key.T, case.soft_cap)
                out[b, heads] = probabilities(logits, sinks_of(case, heads)) @ value
            else:
                out[b, heads] = repository(
                    *(query[heads], key, key, value),
                    **numbers(read, s, case.head_size),
                    sinks=sinks_of(case, heads),
                    soft_cap=case.soft_cap,
                ).out
    return out
