"""Every option, on one page: the keys of ``additional_config["sparq"]`` and what they resolve to for a model.

    vllm serve MODEL --attention-backend sparq --additional-config '{"sparq": {"compression": 4}}'

`parse_options` checks what the user wrote, before a model is loaded; `Options.sparq_read` and `Options.spans_read` turn
it into numbers for one model. Nothing here knows about vLLM or tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_sparq.retention import Retention

DEFAULT_BUDGET = 1024
"""Tokens that a request keeps per KV head where tokens are evicted and the user names no budget."""

DEFAULT_SINKS = {"window": 4}
"""Retention -> first tokens that stay: StreamingLLM's four (arXiv 2309.17453); H2O has none."""

NAMESPACE = "sparq"
"""Our key in vLLM's ``additional_config``."""

SPAN_TOKENS = 16
"""Tokens of a span: the neighbours that ``read: spans`` reads or leaves as one. No span crosses a block."""

LEAST_SPANS = 3
"""Spans of a context that are read at least, as by Quest's authors."""

MEASURED_BREAK_EVEN = 1024
"""Tokens of context from which a SparQ read beats our own dense read (``vllm-sparq bench ops`` measures it)."""

PRESETS: dict[str, dict[str, Any]] = {
    "sparq": {},
    "quest": {"read": "spans", "dense_layers": 2},
    "flexgen": {"format": "int4", "read": "dense"},
    "kivi": {"format": "kivi4", "read": "dense"},
    "h2o": {"retention": "heavy_hitter", "read": "dense"},
    "streaming": {"retention": "window", "read": "dense"},
}
"""``--attention-backend`` -> the defaults that it changes. Any option given beside it wins."""


class Options(BaseModel):
    """What a user may set. The docstring of each field is what ``vllm-sparq doctor`` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: Literal["model", "int8", "int4", "kivi4", "kivi2"] = "model"
    """How full blocks are stored: the model's type, or codes (int4: FlexGen; kivi: KIVI). 1/2 to 1/5 of the memory."""
    group_size: int | None = Field(default=None, ge=8)
    """Elements that share a scale, for int4 (default 64) and kivi (default 32)."""
    chunk: Literal["codes", "exact"] = "codes"
    """How a prompt sees the full blocks of its own chunk: as codes, like any other, or exactly, as KIVI does.

    With codes an answer does not depend on how its prompt was cut, cached or computed again. Exactly suits 2 bits.
    """
    retention: Literal["all", "heavy_hitter", "window"] = "all"
    """Which tokens stay: all, those with the most attention and the newest (H2O), or the first and the newest."""
    budget: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    """Tokens that a request keeps per KV head, or their share of its prompt. Default: 1024."""
    recent: int | None = Field(default=None, ge=1)
    """heavy_hitter: newest tokens that always stay. Default: half of the budget."""
    sinks: int | None = Field(default=None, ge=0)
    """First tokens of a request that always stay. Default: 4 for window, 0 for heavy_hitter."""
    prefill: Literal["full", "bounded"] = "full"
    """When a prompt is cut to the budget: full, once it has been read; bounded, every 256 tokens while it is read.

    full keeps answers best, but a prompt needs its whole memory for a moment. bounded never does.
    """
    pressure: Literal["preempt", "evict"] = "preempt"
    """When the pool is full: preempt a request, as vLLM does, or evict more tokens of those that run."""
    read: Literal["sparq", "spans", "dense"] = "sparq"
    """What a decode step reads: the tokens SparQ picks, the spans of 16 tokens Quest picks, or all tokens."""
    compression: float = Field(default=8.0, ge=1.0, allow_inf_nan=False)
    """Bytes of a dense read per byte of a sparse one: sets r = D / compression and k = S / (2 * compression).

    With read spans, k = S / compression - S / 16, and compression must be below 16, since the bounds of spans are 1/16.
    """
    r: int | None = Field(default=None, ge=1)
    """Query components that rank the tokens; at most the head size. Overrides compression."""
    k: int | None = Field(default=None, ge=1)
    """Cached tokens attended to exactly, beside the current one. Overrides compression and min_k."""
    local: int | None = Field(default=None, ge=0)
    """How many of the k are the newest tokens, whatever their rank. Default: a quarter of k."""
    min_k: int = Field(default=128, ge=1)
    """Floor of the k that compression sets: below about 64 the mean value and short contexts suffer.

    With mass it is the least that may be read, whatever sets k.
    """
    mass: float | None = Field(default=None, gt=0, lt=1)
    """Read only as many of the k as hold this share of the estimated probability, but no fewer than min_k.

    Each step, layer and KV head reads its own number: between min_k, or the newest tokens if they are more, and k. It
    takes the scores of every query head, as the mean value does. Measure it: heads that look sure may be wrong.
    """
    ranking: Literal["int4", "int8", "model"] = "int4"
    """Type of the channel-major copy of K that ranks the tokens: +14%, +27% or +50% memory."""
    mean_value: Literal["auto", "on", "off"] = "auto"
    """Give the probability of unread tokens to the mean of V. auto: off with grouped queries and summed logits."""
    group_reduce: Literal["logits", "probs"] = "logits"
    """How the scores of a query group combine: summed logits (the authors' code) or probabilities (the paper).

    Probabilities, and the mean value that auto adds to them, keep answers better and take 1.1 to 1.5 times as long.
    """
    dense_layers: int = Field(default=0, ge=0)
    """First layers of the model that always read densely. quest: 2."""
    dense_below: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Contexts shorter than this many tokens are read densely. auto: below the measured break-even."""

    def sparq_read(self, *, head_size: int, n_heads: int, n_kv_heads: int) -> SparqRead:
        """The numbers of a SparQ read for one model.

        Raises:
            ValueError: r is larger than the model's head size.
        """
        r = self.r if self.r is not None else max(1, round(head_size / self.compression))
        if r > head_size:
            raise ValueError(
                f"sparq option r={r} is larger than the model's head size {head_size}: "
                f"use r <= {head_size} (r = {head_size} ranks with every channel), or leave r out"
            )
        return SparqRead(
            r=r,
            min_k=self.min_k if self.k is None else self.k,
            k_per_token=Fraction(1 / (2 * self.compression)).limit_denominator(4096) if self.k is None else Fraction(0),
            local=self.local,
            alpha_floor=0.0 if self.reallocates(grouped=n_heads != n_kv_heads) else 1.0,
            group_reduce=self.group_reduce,
            mass=self.mass,
            least_k=self.min_k,
            dense_below=self._dense_below,
        )

    def spans_read(self) -> SpansRead:
        """The numbers of a read of spans, alike for every model."""
        slope = Fraction(1 / self.compression).limit_denominator(4096) - Fraction(1, SPAN_TOKENS)
        return SpansRead(
            min_k=self.min_k if self.k is None else self.k,
            k_per_token=slope if self.k is None else Fraction(0),
            dense_below=self._dense_below,
        )

    @property
    def _dense_below(self) -> int:
        return MEASURED_BREAK_EVEN if self.dense_below == "auto" else self.dense_below

    def retained(self, block_size: int) -> Retention | None:
        """What stays of a request and when tokens go, in numbers; None where all stay."""
        if self.retention == "all":
            return None
        pages_hold_tokens_only = self.format == "model" and self.read == "dense"
        return Retention(
            budget=DEFAULT_BUDGET if self.budget is None else self.budget,
            recent=1 if self.retention == "window" else self.recent,
            sinks=DEFAULT_SINKS.get(self.retention, 0) if self.sinks is None else self.sinks,
            bounded=self.prefill == "bounded",
            interval=1 if pages_hold_tokens_only else block_size,
            block_size=block_size,
        )

    def reallocates(self, *, grouped: bool) -> bool:
        """Whether a SparQ read gives the probability of unread tokens to the mean of V.

        With grouped queries (several query heads per KV head) and summed logits it does so only when told to: answers
        suffer there. With summed probabilities, as in the paper, they gain (README, `read_simulation`).
        """
        return self.mean_value == "on" or (self.mean_value == "auto" and (not grouped or self.group_reduce == "probs"))


@dataclass(frozen=True, kw_only=True)
class SparseRead:
    """How much of a context is read. S is the context length, the current token included.

    Attributes:
        min_k: floor of k (tokens).
        k_per_token: slope of k over S; zero for a fixed k.
        dense_below: contexts shorter than this are read densely (tokens).
    """

    min_k: int
    k_per_token: Fraction = Fraction(0)
    dense_below: int = 0

    def k(self, context_len: int) -> int:
        """Cached tokens to read: exact integer arithmetic, alike in every kernel."""
        slope = self.k_per_token
        return max(self.min_k, context_len * slope.numerator // slope.denominator)


@dataclass(frozen=True, kw_only=True)
class SparqRead(SparseRead):
    """A SparQ read, resolved for one model: k tokens beside the current one.

    Attributes:
        r: channels that rank the tokens.
        local: newest cached tokens that are always read; None for a quarter of k.
        alpha_floor: least weight of the exact part of the output; 0 is the paper's mean-value reallocation, 1 switches
            it off, anything between bounds what the mean value may take.
        group_reduce: ``logits | probs``.
        mass: share of the approximate probability that what is read must hold; None reads all of k.
        least_k: with ``mass``, cached tokens that are read at least.
    """

    r: int
    local: int | None = None
    alpha_floor: float = 1.0
    group_reduce: Literal["logits", "probs"] = "logits"
    mass: float | None = None
    least_k: int = 1

    def n_selected(self, context_len: int) -> int:
        """Tokens read, the current one included; with ``mass``, tokens read at most."""
        return min(context_len, self.k(context_len) + 1)

    def n_least(self, context_len: int) -> int:
        """Tokens read at least, the current one included: `n_local`, and with ``mass`` ``least_k``, else all."""
        if self.mass is None:
            return self.n_selected(context_len)
        return max(self.n_local(context_len), min(self.n_selected(context_len), self.least_k + 1))

    def n_local(self, context_len: int) -> int:
        """Newest tokens among them that need no rank, the current one included."""
        k = self.k(context_len)
        return min(context_len, (k // 4 if self.local is None else min(self.local, k)) + 1)

    def is_dense(self, context_len: int) -> bool:
        """Whether this context is read in full: too short to gain, or no longer than what would be picked."""
        return context_len < self.dense_below or context_len <= self.k(context_len) + 1


@dataclass(frozen=True, kw_only=True)
class SpansRead(SparseRead):
    """A read of whole spans of neighbouring tokens (Quest), resolved: k tokens, the current one among them."""

    def n_spans(self, context_len: int) -> int:
        """Spans read, the newest included: k // 16, but no fewer than `LEAST_SPANS` where there are so many."""
        return min(spans_of(context_len), max(LEAST_SPANS, self.k(context_len) // SPAN_TOKENS))

    def n_selected(self, context_len: int) -> int:
        """Tokens read, those of the newest span included, which may hold fewer than the others."""
        return context_len - (spans_of(context_len) - self.n_spans(context_len)) * SPAN_TOKENS

    def is_dense(self, context_len: int) -> bool:
        """Whether this context is read in full: too short to gain, or with no more spans than would be picked."""
        return context_len < self.dense_below or self.n_spans(context_len) == spans_of(context_len)


def spans_of(n_tokens: int) -> int:
    """Spans that so many tokens fill or begin."""
    return -(-n_tokens // SPAN_TOKENS)


ALLOWED = {
    "dense_below": "'auto' or a number of tokens >= 0",
    "budget": "a whole number of tokens >= 1, or a fraction of the prompt above 0 and at most 1",
}
"""Option -> its values in words, where its type is a union that pydantic explains branch by branch."""


class OptionsError(ValueError):
    """What the user wrote under ``additional_config["sparq"]`` cannot be used."""


def parse_options(additional_config: Mapping[str, Any] | None, backend: str = "sparq") -> Options:
    """Options from vLLM's ``additional_config``, for a ``--attention-backend`` of ours.

    Raises:
        OptionsError: an unknown key, a wrong type or a value out of range; the message names value, rule and remedy.
    """
    given = (additional_config or {}).get(NAMESPACE, {})
    if not isinstance(given, Mapping):
        raise OptionsError(
            f'additional_config["{NAMESPACE}"] must be an object of options, got {given!r}; '
            f'write for example --additional-config \'{{"{NAMESPACE}": {{"compression": 4}}}}\''
        )
    try:
        options = Options.model_validate({**PRESETS[backend], **given})
    except ValidationError as error:
        raise OptionsError("; ".join(_explain(e) for e in _distinct(error))) from None
    _check_mass(options)
    if options.read == "spans":
        _check_spans(options)
    _check_retention(options)
    return options


def _check_mass(options: Options) -> None:
    """A share of the probability has nothing to choose where the least is the most."""
    if options.mass is not None and options.k is not None and options.min_k >= options.k:
        raise OptionsError(
            f"sparq option mass={options.mass} means nothing with k={options.k} and min_k={options.min_k}, the most "
            "and the least tokens that it may read: set min_k below k, or leave mass out"
        )


def _check_spans(options: Options) -> None:
    """Options that mean nothing to a read of spans, or that it cannot keep."""
    meaningless = ("r", "local", "mass", "ranking", "mean_value", "group_reduce")
    _refuse(options, meaningless, "with read 'spans': set k or compression, set read 'sparq'")
    if options.retention != "all":
        raise OptionsError(
            f"sparq option retention={options.retention!r} puts tokens from elsewhere into the slots of evicted ones, "
            f"so that the {SPAN_TOKENS} tokens of a span are no neighbours and their bounds say nothing: with "
            "read 'spans' use retention 'all', or set read 'sparq' or 'dense'"
        )
    if options.k is None and options.compression >= SPAN_TOKENS:
        raise OptionsError(
            f"sparq option compression={options.compression} leaves read 'spans' no token to read: the bounds of spans "
            f"alone are 1/{SPAN_TOKENS} of a dense read, so use compression < {SPAN_TOKENS}, or set k"
        )


def _refuse(options: Options, names: Iterable[str], where: str) -> None:
    """Options that the user has set although they mean nothing ``where``, which ends with one remedy."""
    for name in names:
        value = getattr(options, name)
        if value != Options.model_fields[name].default:
            raise OptionsError(f"sparq option {name}={value!r} means nothing {where}, or leave it out")


def _check_retention(options: Options) -> None:
    """Options of eviction that mean nothing, or too much, together."""
    if options.retention == "all":
        meaningless = ("budget", "recent", "sinks", "prefill", "pressure")
        _refuse(options, meaningless, "while all tokens stay: add retention 'heavy_hitter' or 'window'")
        return
    if options.retention == "window" and options.recent is not None:
        raise OptionsError(
            f"sparq option recent={options.recent} means nothing with retention 'window', which keeps the newest "
            "budget - sinks tokens: set budget and sinks instead"
        )
    check_budget(options, 1)


def check_budget(options: Options, block_size: int) -> None:
    """A budget in tokens must hold what always stays, and the room that one eviction makes.

    Raises:
        OptionsError: it does not.
    """
    retained = options.retained(block_size)
    if retained is None or not isinstance(retained.budget, int) or retained.budget >= retained.least_budget:
        return
    recent = 1 if retained.recent is None else retained.recent
    raise OptionsError(
        f"sparq option budget={retained.budget} is too small: recent ({recent}) and sinks ({retained.sinks}) always "
        f"stay, and {retained.interval} go at a time, so use budget >= {retained.least_budget}"
        + (", or a smaller --block-size" if retained.interval > 1 else "")
    )


def _distinct(error: ValidationError) -> list[dict[str, Any]]:
    """One finding per option: a union type reports each of its branches."""
    by_option: dict[str, dict[str, Any]] = {}
    for finding in error.errors(include_url=False):
        by_option.setdefault(str(finding["loc"][0]), dict(finding))
    return list(by_option.values())


def _explain(finding: Mapping[str, Any]) -> str:
    name = str(finding["loc"][0])
    known = list(Options.model_fields)
    if finding["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown sparq option {name!r}.{hint} Known options: {', '.join(known)}"
    field = Options.model_fields[name]
    allowed = ALLOWED.get(name) or finding["msg"].lower()
    return f"sparq option {name}={finding['input']!r} is not usable: {allowed}. {field.description}"
