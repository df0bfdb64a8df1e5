"""What `vllm-sparq tune` may turn: one row of `SPACE` for each option, and the settings it begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sparq.attention_backends.engine import on_platform
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.reads import READS
from vllm_sparq.reads.base import MEASURED_BREAK_EVEN
from vllm_sparq.retention import RETENTIONS

DEFAULT: dict[str, Any] = {}
"""Options of `--attention-backend sparq` as it comes: what every other setting is compared with."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Where a setting is tried.

    Attributes:
        shape: of the model's cache.
        context: tokens of a request.
        batch: requests at a time.
    """

    shape: CacheShape
    context: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Dial:
    """An option and the values it is tried at.

    Attributes:
        name: of the option.
        values: in order where there is one.
        when: whether the option means anything beside those chosen above it.
    """

    name: str
    values: Callable[[Workload], list[Any]]
    when: Callable[[Mapping[str, Any]], bool] = lambda chosen: True


def _reads_sparsely(chosen: Mapping[str, Any]) -> bool:
    return "k" in READS[chosen["read"]].dials


def _ranks_tokens(chosen: Mapping[str, Any]) -> bool:
    return "r" in READS[chosen["read"]].dials


def _has_ranking_copy(chosen: Mapping[str, Any]) -> bool:
    if not _ranks_tokens(chosen):
        return False
    stored = FORMATS[chosen["format"]]
    return stored is None or not stored.channel_keys


def _tokens(workload: Workload) -> list[int]:
    """Powers of two below the context; from there on everything is read."""
    return [k for k in (32, 64, 128, 256, 512, 1024, 2048) if 2 * k <= workload.context] or [32]


def _reads_codes(chosen: Mapping[str, Any]) -> bool:
    return not READS[chosen["read"]].own_ranking


def _can_evict(chosen: Mapping[str, Any]) -> bool:
    return READS[chosen["read"]].evictable


def _evicts(chosen: Mapping[str, Any]) -> bool:
    return bool(chosen.get("retention", "all") != "all")


SPACE = (
    Dial(name="read", values=lambda w: list(READS)),
    Dial(name="retention", values=lambda w: list(RETENTIONS), when=_can_evict),
    Dial(name="budget", values=lambda w: [0.25, 0.5, 0.75], when=_evicts),
    Dial(name="format", values=lambda w: list(FORMATS), when=_reads_codes),
    Dial(name="ranking", values=lambda w: ["int4", "int8", "model"], when=_has_ranking_copy),
    Dial(
        name="r",
        values=lambda w: [max(1, w.shape.head_size // part) for part in (16, 8, 4, 2, 1)],
        when=_ranks_tokens,
    ),
    Dial(name="k", values=_tokens, when=_reads_sparsely),
    Dial(name="local_share", values=lambda w: [0.0, 0.125, 0.25, 0.5], when=_ranks_tokens),
    Dial(name="group_reduce", values=lambda w: ["logits", "probs"], when=_ranks_tokens),
    Dial(name="dense_layers", values=lambda w: [n for n in (0, 1, 2) if n < w.shape.n_layers], when=_reads_sparsely),
)
"""The search space, in the order in which it is drawn. A later axis is another row."""


def draw(suggest: Callable[[str, list[Any]], Any], workload: Workload) -> dict[str, Any]:
    """A value for each dial that means something, from ``suggest(name, values)``."""
    chosen: dict[str, Any] = {}
    for dial in SPACE:
        if dial.when(chosen):
            chosen[dial.name] = suggest(dial.name, dial.values(workload))
    return chosen


def options_of(chosen: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    """What a user writes for the dials' values: nothing that is a default anyway."""
    options = dict(chosen)
    if "local_share" in options:
        options["local"] = round(options.pop("local_share") * options["k"])
        if options["local"] == options["k"] // 4:
            del options["local"]
    if _reads_sparsely(options) and workload.context < 2 * _break_even():
        options["dense_below"] = 0  # short contexts are read densely otherwise, whatever the dials say
    defaults = {"read": "sparq", "format": "model", "ranking": "int4", "group_reduce": "logits", "dense_layers": 0}
    defaults["retention"] = "all"
    return {name: value for name, value in options.items() if value != defaults.get(name)}


def _break_even() -> int:
    """Tokens below which contexts are read densely on this platform, if nobody says otherwise."""
    below = on_platform(Options()).dense_below
    return MEASURED_BREAK_EVEN if below == "auto" else below


def starting_points(workload: Workload) -> list[dict[str, Any]]:
    """Dial values worth trying before any are drawn: the papers' middle in variants, 4 and 8 bits, half the tokens."""
    rank = max(1, workload.shape.head_size // 4)
    k = min(128, max(_tokens(workload)))
    sparse = dict(read="sparq", ranking="int4", r=rank, k=k, local_share=0.25, group_reduce="logits", dense_layers=0)
    sparse |= dict(retention="all", format="model")
    dense = dict(read="dense", retention="all")
    return [
        sparse,
        {**sparse, "format": "int4"},
        {**dense, "format": "int4"},
        {**sparse, "group_reduce": "probs"},
        {**sparse, "r": max(1, rank // 2)},
        {**dense, "format": "int8"},
        {**dense, "format": "model", "retention": "heavy_hitter", "budget": 0.5},
    ]


def method_of(options: dict[str, Any], name: str) -> Method:
    """A setting as an engine is started with it."""
    method = Method(name=name, backend="SPARQ", options=options)
    method.check()
    return method
