"""What every read answers, and what sparse ones share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from vllm_sparq.config import Options
    from vllm_sparq.layout import PageLayout

MEASURED_BREAK_EVEN = 1024
"""Tokens of context from which a sparse read beats our own dense read (``vllm-sparq bench ops`` measures it)."""

CUDA_BREAK_EVEN = 16384
"""The same on CUDA: estimated from the launches that a sparse read takes more, since no GPU has measured it yet.

It does not depend on the batch, though speed does: what a request answers must not.
"""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The heads of one attention layer: H query heads on G KV heads of D elements."""

    head_size: int
    n_heads: int
    n_kv_heads: int

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a KV head."""
        return self.n_heads != self.n_kv_heads


@dataclass(frozen=True, kw_only=True)
class PageNeeds:
    """What a read needs in a page beside K and V.

    Attributes:
        ranking: kind of the ranking copy of K (`vllm_sparq.layout.PageLayout.ranking`); None for none.
        value_sum: whether the sum of V before the block.
    """

    ranking: str | None = None
    value_sum: bool = False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much of a context is read, in whole numbers, for kernels: k is ``max(min_k, S * slope // per_tokens)``.

    Attributes:
        local: newest tokens that are read whatever their rank; None for a quarter of k, -1 where none are told apart.
        dense_below: contexts shorter than this are read in full (tokens).
        span: neighbouring tokens that are read together.
    """

    min_k: int
    slope: int
    per_tokens: int
    local: int | None
    dense_below: int
    span: int


@dataclass(frozen=True, kw_only=True)
class Read:
    """A read, resolved for one layer. A new one is a subclass and a row in `READS`.

    Attributes:
        op: the decode op, as `vllm_sparq.ops.dispatch` names it.
        dials: options that turn it.
        meaningless: options of other reads that are refused beside it, since they would be taken for its own.
        instead: how the user gets what such an option is for.
        evictable: whether it can read pages in which tokens have taken the slots of others.
        own_ranking: whether what ranks tokens is chosen by the queries of their request (`vllm_sparq.ops.represent`).
            Nobody else can use its blocks then, and a token that has been written cannot be taken back.
    """

    op: ClassVar[str]
    dials: ClassVar[tuple[str, ...]] = ()
    meaningless: ClassVar[tuple[str, ...]] = ()
    evictable: ClassVar[bool] = True
    own_ranking: ClassVar[bool] = False
    instead: ClassVar[str] = ""

    @classmethod
    def problems(cls, options: Options) -> Iterator[str]:
        """What it cannot keep of the options, in words, beyond those that mean nothing to it."""
        yield from ()

    @classmethod
    def resolve(cls, options: Options, heads: HeadShape) -> Self:
        """The numbers of this read for one layer.

        Raises:
            ValueError: an option does not fit the layer.
        """
        return cls()

    @classmethod
    def needs(cls, options: Options, *, grouped: bool) -> PageNeeds:
        """What pages must carry for it; ``grouped``: several query heads per KV head."""
        return PageNeeds()

    @classmethod
    def prefers_long_blocks(cls, options: Options) -> bool:
        """Whether it reads long runs of a page, so that longer blocks are faster."""
        return False

    @property
    def arguments(self) -> dict[str, Any]:
        """What its op takes beside the arguments that all decode ops share."""
        return {"read": self}

    @property
    def counts(self) -> Counts | None:
        """How much is read, for kernels; None for all of it."""
        return None

    def is_dense(self, context_len: int) -> bool:
        """Whether this context is read in full."""
        return True

    def dense_up_to(self, limit: int) -> int:
        """The longest context, of at most ``limit`` tokens, that is read in full as all shorter ones are."""
        return limit

    def n_selected(self, context_len: int) -> int:
        """Tokens read, the current one included, where the context is not read in full; at most, if they vary."""
        return context_len

    def n_least(self, context_len: int) -> int:
        """Tokens read at least."""
        return self.n_selected(context_len)

    def bytes_moved(self, layout: PageLayout, context_len: int) -> float:
        """Bytes of one KV head's cache that a decode step reads; every block counts as full."""
        if self.is_dense(context_len):
            return context_len * layout.token_bytes
        return self.bytes_selected(layout, context_len)

    def bytes_selected(self, layout: PageLayout, context_len: int) -> float:
        """The same where the context is not read in full: what ranks its tokens, and the tokens read."""
        return self.n_selected(context_len) * layout.token_bytes

    def describe(self, options: Options, heads: HeadShape) -> list[str]:
        """For people: what a decode step does, a sentence for each fact."""
        return ["a decode step reads every token"]

    def numbers(self, context_len: int) -> dict[str, int]:
        """How much is read of one context, by name, for reports."""
        return {"tokens_read": context_len if self.is_dense(context_len) else self.n_selected(context_len)}

    def explain(self, context_len: int) -> str:
        """The same in words, where the context is not read in full."""
        return "all of them"


@dataclass(frozen=True, kw_only=True)
class SparseRead(Read):
    """A read of k cached tokens of each context.

    Attributes:
        min_k: floor of k (tokens).
        k_per_token: slope of k over S; zero for a fixed k.
        dense_below: contexts shorter than this are read densely (tokens).
    """

    dials: ClassVar[tuple[str, ...]] = ("compression", "k", "min_k", "dense_layers", "dense_below")

    min_k: int
    k_per_token: Fraction = Fraction(0)
    dense_below: int = 0

    def k(self, context_len: int) -> int:
        """Cached tokens to read: exact integer arithmetic, alike in every kernel."""
        slope = self.k_per_token
        return max(self.min_k, context_len * slope.numerator // slope.denominator)

    def dense_up_to(self, limit: int) -> int:
        return bisect_left(range(1, limit + 1), True, key=lambda context_len: not self.is_dense(context_len))

    def numbers(self, context_len: int) -> dict[str, int]:
        return {**super().numbers(context_len), "k": self.k(context_len)}

    @classmethod
    def shared(cls, options: Options, slope: Fraction) -> dict[str, Any]:
        """The fields that all sparse reads take from the options; ``slope`` of k where no k is set."""
        below = options.dense_below
        return dict(
            min_k=options.min_k if options.k is None else options.k,
            k_per_token=slope if options.k is None else Fraction(0),
            dense_below=MEASURED_BREAK_EVEN if below == "auto" else below,
        )
