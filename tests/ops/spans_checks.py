"""Whether an answer of `quest_decode` is right: an oracle in numpy, and a check that allows for rounding.

The oracle works from the tokens themselves and the definition in the paper (Tang et al. 2024, arXiv 2406.10774, section
3.3), a span and a query head at a time, and shares nothing with `vllm_sparq`. Which spans an implementation reads shows
in its output (`sparq_checks.tokens_read`), so a tie does not loosen the tolerance of the output: an upper bound moves
by at most ``m_p = tolerances.BOUND * sum_c (|a_c high_pc| + |b_c low_pc|)``, and a span read may be worse than one left
out by no more than both of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tests.ops import tolerances
from tests.ops.cases import Case, Tokens, build
from tests.ops.oracle import Array, capped, probabilities, sinks_of
from tests.ops.rounding import multiplied, rounded_dense_decode
from tests.ops.sparq_checks import cached, tokens_read
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference
from vllm_sparq.reads import SpansRead

SPAN = 16


def n_spans(read: SpansRead, context_len: int) -> int:
    """From the definition of the options and not from `SpansRead`'s own arithmetic."""
    k = max(read.min_k, int(context_len * read.k_per_token))
    return min((context_len + SPAN - 1) // SPAN, max(3, k // SPAN))


def upper_bounds(query: Array, keys: Array) -> tuple[Array, Array]:
    """Per span, what ``sum_g q_g . K`` cannot exceed, and the size of its terms: query [H', D], keys [S, D]."""
    finite, upper, size = np.where(np.isfinite(keys), keys, 0.0), [], []
    for first in range(0, len(keys), SPAN):
        span = finite[first : first + SPAN]
        low, high = span.min(0), span.max(0)
        terms = [np.maximum(q * low, q * high) for q in query]
        upper.append(sum(term.sum() for term in terms))
        size.append(sum((np.abs(q) * np.where(q > 0, np.abs(high), np.abs(low))).sum() for q in query))
    return np.array(upper), np.array(size)


def choose(upper: Array, n: int) -> Array:
    """Ascending: the newest span, and the best of the others, the older one first among equals."""
    others = sorted(range(len(upper) - 1), key=lambda p: (-upper[p], p))[: n - 1]
    return np.array(sorted([*others, len(upper) - 1]))


def attend(query: Array, keys: Array, values: Array, spans: Array, case: Case, sinks: Array | None) -> Array:
    """[H', D] over the tokens of ``spans``."""
    tokens = [t for p in spans for t in range(p * SPAN, min(p * SPAN + SPAN, len(keys)))]
    return probabilities(capped(case.scale * query @ keys[tokens].T, case.soft_cap), sinks) @ values[tokens]


def assert_right(
    run: Callable[..., None],
    case: Case,
    tokens: Tokens,
    read: SpansRead,
    on: str = "cpu",
    *,
    rounds: bool = False,
    probes: bool = True,
) -> None:
    """``run`` reads spans that it may read, and answers what follows from them.

    Args:
        run, case, tokens, read, on: the op, and what it is given, where.
        rounds: it multiplies what the codes of quantized pages stand for in the model's type: see `tolerances.OUT`.
        probes: find out what it reads; else it is taken to read what the oracle does.
    """
    world, group = build(case, tokens, device=on), case.heads // case.kv_heads
    got = world.decode(run, read=read).cpu()
    seen = tokens_read(run, world, read) if probes else {}
    dense = build(case, tokens).decode(rounded_dense_decode if rounds else dense_reference)
    tolerance = tolerances.OUT[case.dtype]
    for b, s in enumerate(case.lens):
        if s < read.dense_below or n_spans(read, s) == -(-s // SPAN):
            torch.testing.assert_close(got[b], dense[b], **tolerance)
            continue
        for g in range(case.kv_heads):
            heads, where = slice(g * group, (g + 1) * group), f"request {b}, KV head {g}"
            query = tokens.query[b][0, heads].double().numpy()
            upper, size = upper_bounds(query, tokens.key[b][:, g].double().numpy())
            spans = choose(upper, n_spans(read, s))
            if probes:
                spans = spans_read(seen[b, g], s, where)
                assert_may_read(spans, upper, tolerances.BOUND[case.dtype] * size, n_spans(read, s), where)
            key, value = cached(world, b, g)
            if rounds:
                held = zip(("key", "value"), (key, value), strict=True)
                key, value = (multiplied(case.layout, part, torch.from_numpy(x)).double().numpy() for part, x in held)
            want = attend(query, key, value, spans, case, sinks_of(case, heads))
            room = tolerance["atol"] + tolerance["rtol"] * np.abs(want)
            miss = (np.abs(got[b, heads].double().numpy() - want) / room).max()
            assert miss <= 1, f"{where} (S={s}): off by {miss:.3g} tolerances"


def spans_read(tokens: Array, context_len: int, where: str) -> Array:
    """The spans of the tokens read, which must be all of theirs."""
    spans = np.unique(tokens // SPAN)
    whole = [t for p in spans for t in range(p * SPAN, min(p * SPAN + SPAN, context_len))]
    assert tokens.tolist() == whole, f"{where}: not whole spans"
    return spans


def assert_may_read(spans: Array, upper: Array, margin: Array, n: int, where: str) -> None:
    assert len(spans) == n, f"{where}: {len(spans)} spans read"
    assert len(upper) - 1 in spans, f"{where}: the newest span is not read"
    left, ranked = np.setdiff1d(np.arange(len(upper)), spans), spans[:-1]
    worst = (upper + margin)[ranked].min(initial=np.inf)
    assert worst >= (upper - margin)[left].max(), f"{where}: a better span is left out"
