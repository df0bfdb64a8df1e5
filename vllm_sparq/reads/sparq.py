"""``read: sparq``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from vllm_sparq.formats import FORMATS
from vllm_sparq.reads.base import Counts, HeadShape, PageNeeds, SparseRead

if TYPE_CHECKING:
    from vllm_sparq.config import Options
    from vllm_sparq.layout import PageLayout

RANKING_SHARE = {"int4": Fraction(1, 8), "int8": Fraction(1, 4), "model": Fraction(1, 2)}
"""Bytes of each ranking copy, scales left out, by those of a token's K and V in 16 bits.

What r channels of it leave of a dense read's bytes divided by ``compression`` is spent on k. It is the same number for
every block format with such a copy; where K is channel-major and ranks itself, it is half of a token.
"""


@dataclass(frozen=True, kw_only=True)
class SparqRead(SparseRead):
    """SparQ (arXiv 2312.04985): the k tokens that r channels rank highest, beside the current one.

    Attributes:
        r: channels that rank the tokens.
        local: newest cached tokens that are always read; None for a quarter of k.
        alpha_floor: least weight of the exact part of the output; 0 is the paper's mean-value reallocation, 1 switches
            it off, anything between bounds what the mean value may take.
        group_reduce: ``logits | probs``.
        mass: share of the approximate probability that what is read must hold; None reads all of k.
        least_k: with ``mass``, cached tokens that are read at least.
    """

    op: ClassVar[str] = "sparq_decode"
    dials: ClassVar[tuple[str, ...]] = (
        *SparseRead.dials,
        "r",
        "local",
        "mass",
        "ranking",
        "mean_value",
        "group_reduce",
    )

    r: int
    local: int | None = None
    alpha_floor: float = 1.0
    group_reduce: Literal["logits", "probs"] = "logits"
    mass: float | None = None
    least_k: int = 1

    @classmethod
    def problems(cls, options: Options) -> Iterator[str]:
        if options.mass is not None and options.k is not None and options.min_k >= options.k:
            yield (
                f"sparq option mass={options.mass} means nothing with k={options.k} and min_k={options.min_k}, the "
                "most and the least tokens that it may read: set min_k below k, or leave mass out"
            )
        if options.local is not None and options.k is not None and options.local > options.k:
            yield (
                f"sparq option local={options.local} is more than k={options.k}, and the newest tokens are some of "
                f"the k: use local <= {options.k}, or k >= {options.local}"
            )

    @classmethod
    def resolve(cls, options: Options, heads: HeadShape) -> Self:
        size = heads.head_size
        r = options.r if options.r is not None else max(1, round(size / options.compression))
        if r > size:
            raise ValueError(
                f"sparq option r={r} is larger than the model's head size {size}: "
                f"use r <= {size} (r = {size} ranks with every channel), or leave r out"
            )
        copy = cls.needs(options, grouped=heads.grouped).ranking
        share = Fraction(1, 2) if copy is None else RANKING_SHARE[copy]
        return cls(
            r=r,
            local=options.local,
            alpha_floor=0.0 if cls.reallocates(options, grouped=heads.grouped) else 1.0,
            group_reduce=options.group_reduce,
            mass=options.mass,
            least_k=options.min_k,
            **cls.shared(
                options,
                Fraction(float(1 - share) / options.compression).limit_denominator(4096),
            ),
        )

    @classmethod
    def reallocates(cls, options: Options, *, grouped: bool) -> bool:
        """Whether the probability of unread tokens goes to the mean of V.

        With grouped queries and summed logits it does so only when told to: answers suffer there. With summed
        probabilities, as in the paper, they gain (docs/decisions).
        """
        auto = not grouped or options.group_reduce == "probs"
        return options.mean_value == "on" or (options.mean_value == "auto" and auto)

    @classmethod
    def needs(cls, options: Options, *, grouped: bool) -> PageNeeds:
        stored = FORMATS[options.format]
        ranks_itself = stored is not None and stored.channel_keys
        return PageNeeds(
            ranking=None if ranks_itself else options.ranking, value_sum=cls.reallocates(options, grouped=grouped)
        )

    @classmethod
    def prefers_long_blocks(cls, options: Options) -> bool:
        return options.ranking == "int4" and options.format == "model"

    @property
    def counts(self) -> Counts:
        slope = self.k_per_token
        return Counts(
            min_k=self.min_k,
            slope=slope.numerator,
            per_tokens=slope.denominator,
            local=self.local,
            dense_below=self.dense_below,
            span=1,
        )

    def is_dense(self, context_len: int) -> bool:
        """Too short to gain, or no longer than what would be picked."""
        return context_len < self.dense_below or context_len <= self.k(context_len) + 1

    def n_selected(self, context_len: int) -> int:
        return min(context_len, self.k(context_len) + 1)

    def n_least(self, context_len: int) -> int:
        """`n_local`, and with ``mass`` ``least_k``, else all."""
        if self.mass is None:
            return self.n_selected(context_len)
        return max(self.n_local(context_len), min(self.n_selected(context_len), self.least_k + 1))

    def n_local(self, context_len: int) -> int:
        """Newest tokens among them that need no rank, the current one included."""
        k = self.k(context_len)
        return min(context_len, (k // 4 if self.local is None else min(self.local, k)) + 1)

    def bytes_selected(self, layout: PageLayout, context_len: int) -> float:
        scan = context_len * layout.ranking_bytes * self.r / layout.head_size
        return scan + self.n_selected(context_len) * layout.token_bytes

    def describe(self, options: Options, heads: HeadShape) -> list[str]:
        mean = (
            "unread tokens count for nothing" if self.alpha_floor else "the mean of V stands in for all unread tokens"
        )
        lines = [
            f"r = {self.r} of {heads.head_size} channels of the {options.ranking} copy of K rank the tokens",
            f"{mean} (mean_value = {options.mean_value})",
        ]
        if self.mass is not None:
            lines.append(
                f"of the tokens below, each step, layer and KV head reads as few as hold {self.mass:.4g} of the "
                f"estimated probability (mass), but no fewer than min_k = {self.least_k} or the newest ones"
            )
        return lines

    def numbers(self, context_len: int) -> dict[str, int]:
        found = {**super().numbers(context_len), "local": self.n_local(context_len) - 1}
        if self.mass is not None:
            found["least_read"] = context_len if self.is_dense(context_len) else self.n_least(context_len)
        return found

    def explain(self, context_len: int) -> str:
        k, local = self.k(context_len), self.n_local(context_len) - 1
        return f"k = {k:,}, the newest {local:,} among them, and the current token"
