"""Which options a running engine can change, and that no page would look different after it has."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_sparq.attention_backends.engine import page_layout, rebind_refusal
from vllm_sparq.attention_backends.impl import PagedImpl
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.cache_bytes import CacheShape
from vllm_sparq.benchmarks.quality.engine import same_cache
from vllm_sparq.benchmarks.tuning.space import Workload, method_of, options_of, starting_points
from vllm_sparq.config import Options, parse_options
from vllm_sparq.reads import DIALS, READS, HeadShape

HEADS = {
    "grouped": HeadShape(head_size=64, n_heads=8, n_kv_heads=2),
    "not grouped": HeadShape(head_size=64, n_heads=8, n_kv_heads=8),
}
VALUES: dict[str, list[Any]] = {
    "compression": [4.0, 8.0],
    "k": [None, 64],
    "min_k": [16, 128],
    "dense_layers": [0, 2],
    "dense_below": ["auto", 0],
    "r": [None, 16],
    "local": [None, 8],
    "mass": [None, 0.9],
    "ranking": ["int4", "int8", "model"],
    "mean_value": ["auto", "on", "off"],
    "group_reduce": ["logits", "probs"],
}
"""Every dial, at values of each kind."""


def test_every_dial_is_here() -> None:
    assert set(VALUES) == DIALS == {dial for read in READS.values() for dial in read.dials}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("stored", ["model", "int4", "kivi4"])
@pytest.mark.parametrize("dial", VALUES)
def test_pages_stay_as_they_are(dial: str, stored: str, heads: str) -> None:
    """Beside every value of the options that decide over pages: what is not refused needs the pages that are there."""
    deciding = (
        {"mean_value": mean, "group_reduce": r} for mean in VALUES["mean_value"] for r in VALUES["group_reduce"]
    )
    for others, (before, after) in itertools.product(list(deciding), itertools.permutations(VALUES[dial], 2)):
        one, other = (Options(**{**others, "format": stored, dial: value}) for value in (before, after))
        kept = [page_layout(options, HEADS[heads], 128, torch.bfloat16) for options in (one, other)]
        refusal = rebind_refusal(one, other, grouped=HEADS[heads].grouped)
        assert (refusal is None) == (kept[0] == kept[1]), (others, before, after)
        if refusal is None:
            other.read_of(HEADS[heads])


@pytest.mark.parametrize(
    "options",
    [{"format": "int4"}, {"retention": "window"}, {"read": "dense"}, {"sharing": "all"}, {"chunk": "exact"}],
    ids=str,
)
def test_other_options_need_an_engine_of_their_own(options: dict[str, Any]) -> None:
    refusal = rebind_refusal(Options(), Options(**options), grouped=True)
    assert refusal is not None
    assert next(iter(options)) in refusal
    assert "start an engine" in refusal


def test_sharing_an_engine_asks_the_same() -> None:
    logits, probs = (Method.named("sparq", {"group_reduce": reduce}) for reduce in ("logits", "probs"))
    assert not same_cache(logits, probs)  # with grouped queries, probabilities bring the mean value along
    off = [Method.named("sparq", {"group_reduce": reduce, "mean_value": "off"}) for reduce in ("logits", "probs")]
    assert same_cache(*off)
    assert same_cache(logits, Method.named("sparq", {"mean_value": "off", "k": 64})) is False  # not on every model


@pytest.mark.parametrize("n_kv_heads", [2, 8])
def test_starting_points_of_a_search_have_the_pages_they_ask_for(n_kv_heads: int) -> None:
    shape = CacheShape(
        n_layers=4, n_heads=8, n_kv_heads=n_kv_heads, head_size=64, dtype=torch.bfloat16, max_model_len=4096
    )
    workload = Workload(shape=shape, context=4096, batch=4)
    methods = [method_of(options_of(point, workload), str(i)) for i, point in enumerate(starting_points(workload))]
    shared = [(a, b) for a, b in itertools.combinations(methods, 2) if same_cache(a, b)]
    assert shared
    for a, b in shared:
        one, other = (page_layout(method.parsed, shape.heads, 128, torch.bfloat16) for method in (a, b))
        assert one == other, (a.options, b.options)


def layer(**options: Any) -> PagedImpl:
    found = object.__new__(PagedImpl)
    found._options, found._heads = parse_options({"sparq": options}), HEADS["grouped"]
    found._pages = SimpleNamespace()  # type: ignore[assignment]
    return found


def test_a_layer_is_bound_anew_or_stays_as_it_is() -> None:
    one, wanted = layer(k=64), Options(k=32)
    one.rebind(wanted)
    assert (one.options, one._pages) == (wanted, None)
    bad = [(Options(group_reduce="probs"), r"value_sum True \(here: False\)"), (Options(r=65), r"r=65 is larger")]
    for options, message in bad:
        two = layer(k=64)
        with pytest.raises(ValueError, match=message):
            two.rebind(options)
        assert two._pages is not None
        assert two.options == Options(k=64)
