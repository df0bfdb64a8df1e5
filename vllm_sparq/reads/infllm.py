"""``read: infllm``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vllm_sparq.reads.base import HeadShape, SparseRead
from vllm_sparq.reads.spans import SPAN_TOKENS, SpansRead, spans_of

if TYPE_CHECKING:
    from vllm_sparq.config import Options

REPRESENTATIVES = 4
"""Keys of a span whose mean ranks it, as by InfLLM's authors."""

WINDOW_SPANS = 8
"""Spans after a span whose queries say which of its keys these are. Until they are there it is in the local window."""


@dataclass(frozen=True, kw_only=True)
class InfllmRead(SpansRead):
    """InfLLM (arXiv 2402.04617): first tokens, a window of the newest, and the spans between that queries look up."""

    dials: ClassVar[tuple[str, ...]] = (*SparseRead.dials, "local")
    meaningless: ClassVar[tuple[str, ...]] = ("r", "mass", "ranking", "mean_value", "group_reduce")
    own_ranking: ClassVar[bool] = True
    ranked_by: ClassVar[str] = "representatives"
    n_first: ClassVar[int] = 1
    least_newest: ClassVar[int] = WINDOW_SPANS + 1
    least: ClassVar[int] = n_first + least_newest + 2

    local: int | None = None

    @classmethod
    def problems(cls, options: Options) -> Iterator[str]:
        yield from super().problems(options)
        least = WINDOW_SPANS * SPAN_TOKENS
        if options.local is not None and options.local < least:
            yield (
                f"sparq option local={options.local} is too small: with read {options.read!r} a span is looked up once "
                f"the queries of {least} later tokens have chosen its representatives, so use local >= {least}"
            )
        elif options.local is not None and options.k is not None:
            yield from cls._too_long_a_window(options.local, options.k)
        if options.format != "model":
            yield (
                f"sparq option format={options.format!r} leaves codes where read {options.read!r} chooses "
                "representatives among keys: use format 'model', or set read 'sparq' or 'spans'"
            )
        if options.sharing == "all":
            yield (
                f"sparq option sharing='all' means nothing with read {options.read!r}: representatives are chosen by a "
                "request's own queries and no block is shared, so leave it out"
            )
        if options.lossless:
            yield (
                f"sparq option lossless=True takes drafts back, and read {options.read!r} has added up their queries "
                "by then: set read 'sparq' or 'spans', or leave lossless out"
            )

    @classmethod
    def _too_long_a_window(cls, local: int, k: int) -> Iterator[str]:
        """What `n_newest` would cut, where k is the same in every context."""
        n_spans, n_newest, n_others = max(cls.least, k // SPAN_TOKENS), spans_of(local) + 1, cls.n_first + 1
        if n_newest + n_others > n_spans:
            yield (
                f"sparq option local={local} leaves no span of k={k} to look up: of the {n_spans * SPAN_TOKENS} tokens "
                f"that are read {cls.n_first * SPAN_TOKENS} are the first, and {SPAN_TOKENS} at least are looked up: "
                f"use local <= {(n_spans - n_others - 1) * SPAN_TOKENS}, or k >= {(n_newest + n_others) * SPAN_TOKENS}"
            )

    @classmethod
    def resolve(cls, options: Options, heads: HeadShape) -> Self:
        return cls(**cls.fields_of(options), local=options.local)

    def describe(self, options: Options, heads: HeadShape) -> list[str]:
        first = self.n_first * SPAN_TOKENS
        return [
            f"the first {first} tokens, a window of the newest, and spans of {SPAN_TOKENS} tokens between, looked up "
            f"by the mean of {REPRESENTATIVES} keys that the queries of the {WINDOW_SPANS * SPAN_TOKENS} tokens after "
            "a span match best"
        ]

    def numbers(self, context_len: int) -> dict[str, Any]:
        found = super().numbers(context_len)
        return found if self.is_dense(context_len) else {**found, "newest_spans": self.n_newest(context_len)}

    def explain(self, context_len: int) -> str:
        n, newest = self.n_spans(context_len), self.n_newest(context_len)
        return f"{n:,} spans: {self.n_first} first, {newest:,} newest, {n - newest - self.n_first:,} looked up"
