"""Every option, on one page: the keys of ``additional_config["sparq"]`` and what they resolve to for a model.

    vllm serve MODEL --attention-backend sparq --additional-config '{"sparq": {"compression": 4}}'

`parse_options` checks what the user wrote, before a model is loaded; `Options.read_of` and `Options.retained` turn it
into numbers for one model. Nothing here knows about vLLM or tensors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_sparq.backends import PRESETS
from vllm_sparq.formats import FORMATS
from vllm_sparq.reads import READS, HeadShape, PageNeeds, Read
from vllm_sparq.retention import EVICTING, RETENTIONS, Retention

DEFAULT_BUDGET = 1024
"""Tokens that a request keeps per KV head where tokens are evicted and the user names no budget."""

NAMESPACE = "sparq"
"""Our key in vLLM's ``additional_config``."""

MOST_TOKENS = 2**30
"""Of any number of tokens that a user may set: longer than any context, and kernels add two of them in 32 bits."""

if TYPE_CHECKING:  # the tables say at run time which names there are
    FormatName: TypeAlias = str
    ReadName: TypeAlias = str
    RetentionName: TypeAlias = str
else:
    FormatName, ReadName, RetentionName = (Literal[tuple(table)] for table in (FORMATS, READS, RETENTIONS))


class Options(BaseModel):
    """What a user may set. The docstring of each field is what ``vllm-sparq doctor`` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    format: FormatName = "model"
    """How full blocks are stored: the model's type, or codes, in 1/2 to 1/5 of the memory.

    int4 is FlexGen's, kivi4 and kivi2 are KIVI's; k8v4 and k4v2 give K more bits than V, since K is what breaks first.
    k4v2 rotates V before it takes two bits of it.
    """
    group_size: int | None = Field(default=None, ge=8)
    """Elements that share a scale: int4, V of k8v4 and of k4v2 (default 64), kivi and K of k4v2 (default 32)."""
    chunk: Literal["codes", "exact"] = "codes"
    """How a prompt sees the full blocks of its own chunk: as codes, like any other, or exactly, as KIVI does.

    With codes an answer does not depend on how its prompt was cut, cached or computed again. Exactly suits 2 bits.
    """
    retention: RetentionName = "all"
    """Which tokens stay: all, those with the most attention and the newest (H2O), or the first and the newest."""
    budget: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | Annotated[float, Field(gt=0, le=1)] | None = None
    """Tokens that a request keeps per KV head, or their share of its prompt. Default: 1024."""
    recent: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """heavy_hitter: newest tokens that always stay. Default: half of the budget."""
    sinks: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    """First tokens of a request that always stay. Default: 4 for window, 0 for heavy_hitter."""
    prefill: Literal["full", "bounded"] = "full"
    """When a prompt is cut to the budget: full, once it has been read; bounded, every 256 tokens while it is read.

    full keeps answers best, but a prompt needs its whole memory for a moment. bounded never does.
    """
    positions: Literal["original", "renumbered", "capped"] = "original"
    """window: where the first tokens seem to be once others are gone. A preview, on CPU, in the model's own type.

    original: where they were, ever farther away. renumbered: right before the newest (StreamingLLM). capped: no farther
    away than the model was trained for (LM-Infinite). Prompts must be bounded, so that their tokens see no more either.
    """
    trained: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Tokens of context that the model was trained for, for positions. Default: its max_position_embeddings."""
    pressure: Literal["preempt", "evict"] = "preempt"
    """When the pool is full: preempt a request, as vLLM does, or evict more tokens of those that run."""
    read: ReadName = "sparq"
    """What a decode step reads: the tokens SparQ picks, the spans of 16 tokens Quest or InfLLM picks, or all tokens.

    spans is Quest's read. infllm reads first tokens, a window and spans looked up between them: a preview, on CPU.
    """
    compression: float = Field(default=8.0, ge=1.0, allow_inf_nan=False)
    """Bytes of a dense read per byte of a sparse one: sets r = D / compression, and k, which gets the bytes left.

    D is the head size, S the context in tokens: k = 7/8 S / compression beside a ranking copy of 4 bits, 3/4 beside one
    of 8, 1/2 beside one in the model's type or none (kivi).
    With read spans or infllm, k = S / compression - S / 16, and compression must be below 16, since what ranks spans is
    1/16.
    """
    r: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Query components that rank the tokens; at most the head size. Overrides compression."""
    k: int | None = Field(default=None, ge=1, le=MOST_TOKENS)
    """Cached tokens attended to exactly, beside the current one. Overrides compression and min_k."""
    local: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    """How many of the k are the newest tokens, whatever their rank. Default: a quarter of k, infllm: two thirds.

    No more than a k that is set; a context whose k compression sets to less reads as many as fit into that.
    With read infllm they are 128 at least.
    """
    min_k: int = Field(default=256, ge=1, le=MOST_TOKENS)
    """Floor of the k that compression sets: at 1,024 tokens a real model loses three times as much by 128 as by 256.

    With mass it is the least that may be read, whatever sets k.
    """
    mass: float | None = Field(default=None, gt=0, lt=1)
    """Read only as many of the k as hold this share of the estimated probability, but no fewer than min_k.

    Each step, layer and KV head reads its own number: between min_k, or the newest tokens if they are more, and k. It
    takes the scores of every query head, as the mean value does. Measure it: heads that look sure may be wrong.
    """
    ranking: Literal["int4", "int8", "model"] = "int4"
    """Type of the channel-major copy of K that ranks tokens: +13%, +26% or +50% memory, and 1% for the mean value."""
    mean_value: Literal["auto", "on", "off"] = "auto"
    """Give the probability of unread tokens to the mean of V. auto: off with grouped queries and summed logits."""
    group_reduce: Literal["logits", "probs"] = "logits"
    """How the scores of a query group combine: summed logits (the authors' code) or probabilities (the paper).

    Probabilities, and the mean value that auto adds to them, keep answers better and take 1.1 to 1.5 times as long.
    """
    dense_layers: int = Field(default=0, ge=0)
    """First layers of the model that always read densely. quest: 2.

    The model must have more: of one with two layers, quest asks for "dense_layers": 0 or 1.
    """
    dense_below: Literal["auto"] | Annotated[int, Field(ge=0, le=MOST_TOKENS)] = "auto"
    """Contexts shorter than this many tokens are read densely.

    auto: below the break-even, 1,024 on CPU (measured) and 16,384 on CUDA (an estimate: not yet measured on a GPU).
    """

    lossless: bool = False
    """The model drafts tokens with this read and verifies them with dense attention, whose answers it gives.

    A preview, on CPU: for contexts so long that attention takes most of a step. Short ones are not drafted for. It
    needs blocks in the model's type, all tokens to stay, layers of one kind (no sliding windows, no states), and no
    LoRA, M-RoPE, pipeline stages or speculative decoding beside it.
    """
    drafts: int = Field(default=3, ge=1, le=16)
    """Tokens that lossless drafts for each verification."""

    sharing: Literal["prompts", "all"] = "prompts"
    """Which blocks prefix caching shares: those that a prompt has written, or all, with decoded tokens in them.

    What a sparse read leaves in a block is not what a prompt would. With all, the next turn of a conversation need not
    read the last answer again, and what it says depends on what was still cached.
    """

    def read_of(self, heads: HeadShape) -> Read:
        """What a decode step reads, in numbers for the layers of one model.

        Raises:
            ValueError: an option does not fit the model.
        """
        return READS[self.read].resolve(self, heads)

    def retained(self, block_size: int) -> Retention | None:
        """What stays of a request and when tokens go, in numbers; None where all stay."""
        policy = RETENTIONS[self.retention]
        if policy is None:
            return None
        pages_hold_tokens_only = self.format == "model" and READS[self.read].needs(self, grouped=True) == PageNeeds()
        return Retention(
            budget=DEFAULT_BUDGET if self.budget is None else self.budget,
            recent=self.recent if policy.recent is None else policy.recent,
            sinks=policy.sinks if self.sinks is None else self.sinks,
            rank=policy.rank,
            bounded=self.prefill == "bounded",
            interval=1 if pages_hold_tokens_only else block_size,
            block_size=block_size,
        )


ALLOWED = {
    "dense_below": f"'auto' or a number of tokens from 0 to {MOST_TOKENS}",
    "budget": f"a whole number of tokens from 1 to {MOST_TOKENS}, or a fraction of the prompt above 0 and at most 1",
}
"""Option -> its values in words, where its type is a union that pydantic explains branch by branch."""


class OptionsError(ValueError):
    """What the user wrote under ``additional_config["sparq"]`` cannot be used."""


def parse_options(additional_config: Mapping[str, Any] | None, backend: str = "sparq") -> Options:
    """Options from vLLM's ``additional_config``, for a ``--attention-backend`` of ours.

    Raises:
        OptionsError: an unknown key, a wrong type or a value out of range; the message names value, rule and remedy.
    """
    check_place(additional_config or {})
    given = (additional_config or {}).get(NAMESPACE, {})
    if not isinstance(given, Mapping):
        raise OptionsError(
            f'additional_config["{NAMESPACE}"] must be an object of options, got {given!r}; '
            f'write for example --additional-config \'{{"{NAMESPACE}": {{"compression": 4}}}}\''
        )
    try:
        options = Options.model_validate({**PRESETS[backend].options, **given})
    except ValidationError as error:
        raise OptionsError("; ".join(_explain(e) for e in _distinct(error))) from None
    _check_read(options)
    _check_retention(options)
    return options


def check_place(additional_config: Mapping[str, Any]) -> None:
    """Refuse options that stand where nothing reads them: beside our key, or below another name for it.

    Raises:
        OptionsError: our key is missing, and another one is an option of ours, or names us and holds options.
    """
    if NAMESPACE in additional_config:
        return  # what is beside it belongs to others
    flat = {str(key): value for key, value in additional_config.items() if key in Options.model_fields}
    below = {
        str(key): value
        for key, value in additional_config.items()
        if isinstance(value, Mapping)
        and (str(key).lower() in PRESETS or difflib.get_close_matches(str(key).lower(), [NAMESPACE], cutoff=0.75))
    }
    if flat or below:
        name, options = (next(iter(flat)), flat) if flat else next(iter(below.items()))
        right = json.dumps({NAMESPACE: options}, default=repr)
        raise OptionsError(
            f'additional_config[{name!r}] is read by nothing: options go below the key "{NAMESPACE}", whatever the '
            f"backend; write --additional-config '{right}', or add \"{NAMESPACE}\": {{}} if it is for another plugin"
        )


def _check_read(options: Options) -> None:
    """Options that mean nothing to a read, or that it cannot keep."""
    read = READS[options.read]
    _refuse(options, read.meaningless, f"with read {options.read!r}: {read.instead}")
    for problem in read.problems(options):
        raise OptionsError(problem)
    if not options.lossless:
        _refuse(options, ("drafts",), "without lossless: set lossless true")
    stored = FORMATS[options.format]
    if stored is None:
        _refuse(options, ("chunk",), "with format 'model', whose blocks are exact: set a format of codes")
    elif stored.channel_keys:
        _refuse(options, ("ranking",), f"with format {options.format!r}, whose K ranks tokens: set format 'int4'")


def _refuse(options: Options, names: Iterable[str], where: str) -> None:
    """Options that the user has set although they mean nothing ``where``, which ends with one remedy."""
    for name in names:
        value = getattr(options, name)
        if value != Options.model_fields[name].default:
            raise OptionsError(f"sparq option {name}={value!r} means nothing {where}, or leave it out")


def _check_retention(options: Options) -> None:
    """Options of eviction that mean nothing, or too much, together."""
    policy = RETENTIONS[options.retention]
    _check_positions(options)
    if policy is not None and options.sharing == "all":
        raise OptionsError(
            f"sparq option sharing='all' means nothing with retention={options.retention!r}: no block is shared "
            "where tokens are evicted, so leave it out, or set retention 'all'"
        )
    if policy is None:
        meaningless = ("budget", "recent", "sinks", "prefill", "pressure")
        _refuse(options, meaningless, f"while all tokens stay: add retention {' or '.join(map(repr, EVICTING))}")
        return
    if policy.recent is not None and options.recent is not None:
        raise OptionsError(
            f"sparq option recent={options.recent} means nothing with retention {options.retention!r}, which keeps the "
            "newest budget - sinks tokens: set budget and sinks instead"
        )
    check_budget(options, 1)


def _check_positions(options: Options) -> None:
    """What positions other than a token's own ask of the rest."""
    if options.positions == "original":
        _refuse(options, ("trained",), "while positions are original: set positions 'capped' or 'renumbered'")
        return
    for name, wanted, why in (
        ("retention", "window", "moves the first tokens, which stay beside a window of the newest alone"),
        ("prefill", "bounded", "is about few tokens, and a prompt that is read in full sees all of its own"),
        ("format", "model", "looks at keys as they are"),
        ("read", "dense", "looks at all tokens that stay"),
    ):
        if getattr(options, name) != wanted:
            raise OptionsError(
                f"sparq option positions={options.positions!r} {why}, got {name}={getattr(options, name)!r}: set "
                f"{name} {wanted!r}, or positions 'original'"
            )
    if isinstance(options.budget, float):
        raise OptionsError(
            f"sparq option positions={options.positions!r} keeps distances within what the model was trained for, and "
            f"budget={options.budget} grows with the prompt: set a budget in tokens"
        )
    if options.sinks == 0:
        raise OptionsError(
            f"sparq option positions={options.positions!r} moves first tokens, and sinks=0 keeps none: set sinks >= 1"
        )


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
    meaning = (field.description or "").partition("\n\n")[0]  # the rest is for docs/options.md
    return f"sparq option {name}={finding['input']!r} is not usable: {allowed}. {meaning}"
