"""``read: spans``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vllm_sparq.reads.base import Counts, HeadShape, PageNeeds, SparseRead

if TYPE_CHECKING:
    from vllm_sparq.config import Options
    from vllm_sparq.layout import PageLayout

SPAN_TOKENS = 16
"""Tokens of a span: the neighbours that ``read: spans`` reads or leaves as one. No span crosses a block."""

SPAN_RANKINGS = ("bounds", "representatives")
"""What pages may hold of each span to rank it by: Quest's, and InfLLM's."""

LEAST_SPANS = 3
"""Spans of a context that are read at least, as by Quest's authors."""


@dataclass(frozen=True, kw_only=True)
class SpansRead(SparseRead):
    """Quest (arXiv 2406.10774): whole spans of neighbouring tokens, of k tokens, the current one among them.

    Attributes:
        ranked_by: what pages hold of a span to rank it by, as `vllm_sparq.layout.PageLayout.ranking` names it.
        n_first: first spans of a context that are read whatever their rank.
        least_newest: newest spans that are, at least.
        least: spans that are read at least, where there are so many.
        local: newest tokens that are; None for two thirds of all.
    """

    op: ClassVar[str] = "quest_decode"
    ranked_by: ClassVar[str] = "bounds"
    n_first: ClassVar[int] = 0
    least_newest: ClassVar[int] = 1
    least: ClassVar[int] = LEAST_SPANS
    local: int | None = 0
    meaningless: ClassVar[tuple[str, ...]] = ("r", "local", "mass", "ranking", "mean_value", "group_reduce")
    evictable: ClassVar[bool] = False
    instead: ClassVar[str] = "set k or compression, set read 'sparq'"

    @classmethod
    def problems(cls, options: Options) -> Iterator[str]:
        if options.retention != "all":
            yield (
                f"sparq option retention={options.retention!r} puts tokens from elsewhere into the slots of evicted "
                f"ones, so that the {SPAN_TOKENS} tokens of a span are no neighbours and their {cls.ranked_by} say "
                f"nothing: with read {options.read!r} use retention 'all', or set read 'sparq' or 'dense'"
            )
        if options.k is None and options.compression >= SPAN_TOKENS:
            yield (
                f"sparq option compression={options.compression} leaves read {options.read!r} no token to read: the "
                f"{cls.ranked_by} of spans alone are 1/{SPAN_TOKENS} of a dense read, so use compression < "
                f"{SPAN_TOKENS}, or set k"
            )

    @classmethod
    def resolve(cls, options: Options, heads: HeadShape) -> Self:
        return cls(**cls.fields_of(options))

    @classmethod
    def fields_of(cls, options: Options) -> dict[str, Any]:
        """The fields of all sparse reads: what ranks spans is 1/16 of a dense read, and k gets the rest."""
        slope = Fraction(1 / options.compression).limit_denominator(4096) - Fraction(1, SPAN_TOKENS)
        return cls.shared(options, slope)

    @classmethod
    def needs(cls, options: Options, *, grouped: bool) -> PageNeeds:
        return PageNeeds(ranking=cls.ranked_by)

    @property
    def counts(self) -> Counts:
        slope = self.k_per_token
        return Counts(
            min_k=max(self.min_k, self.least * SPAN_TOKENS),
            slope=slope.numerator,
            per_tokens=slope.denominator,
            local=-1,
            dense_below=self.dense_below,
            span=SPAN_TOKENS,
        )

    def n_spans(self, context_len: int) -> int:
        """Spans read, the newest included: k // 16, but no fewer than `least` where there are so many."""
        return min(spans_of(context_len), max(self.least, self.k(context_len) // SPAN_TOKENS))

    def n_newest(self, context_len: int) -> int:
        """Newest spans among them that need no rank, the unfinished one included, where not all are read."""
        n = self.n_spans(context_len)
        wanted = 2 * n // 3 if self.local is None else spans_of(self.local) + 1
        return min(max(self.least_newest, wanted), n - self.n_first - 1)

    def n_selected(self, context_len: int) -> int:
        """Tokens read, those of the newest span included, which may hold fewer than the others."""
        return context_len - (spans_of(context_len) - self.n_spans(context_len)) * SPAN_TOKENS

    def is_dense(self, context_len: int) -> bool:
        """Too short to gain, or with no more spans than would be picked."""
        return context_len < self.dense_below or self.n_spans(context_len) == spans_of(context_len)

    def bytes_selected(self, layout: PageLayout, context_len: int) -> float:
        return context_len * layout.ranking_bytes + self.n_selected(context_len) * layout.token_bytes

    def describe(self, options: Options, heads: HeadShape) -> list[str]:
        return [f"spans of {SPAN_TOKENS} tokens, read as one, are ranked by the bounds of K in each channel"]

    def numbers(self, context_len: int) -> dict[str, int]:
        return {**super().numbers(context_len), "spans": self.n_spans(context_len)}

    def explain(self, context_len: int) -> str:
        return f"{self.n_spans(context_len):,} spans, the newest among them"


def spans_of(n_tokens: int) -> int:
    """Spans that so many tokens fill or begin."""
    return -(-n_tokens // SPAN_TOKENS)
