"""Options that mean nothing together, and numbers that nobody can count to."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_sparq.config import MOST_TOKENS, Options, OptionsError, parse_options


def parse(**options: Any) -> Options:
    return parse_options({"sparq": options})


@pytest.mark.parametrize("backend", ["kivi", "flexgen", "h2o", "streaming"])
@pytest.mark.parametrize(
    "option",
    [{"k": 64}, {"compression": 4}, {"r": 8}, {"mass": 0.9}, {"min_k": 64}, {"ranking": "int8"}, {"mean_value": "on"}],
)
def test_options_of_a_sparse_read_are_refused_beside_a_dense_one(backend: str, option: dict[str, Any]) -> None:
    (name, value), *_ = option.items()
    with pytest.raises(
        OptionsError, match=rf"{name}={value!r}.* means nothing with read 'dense': set read 'sparq', or"
    ):
        parse_options({"sparq": option}, backend)
    parse_options({"sparq": {"dense_layers": 2, "dense_below": 0}}, backend)  # that holds, of all layers and contexts


def test_options_that_a_format_has_no_use_for_are_refused() -> None:
    with pytest.raises(
        OptionsError, match=r"chunk='exact' means nothing with format 'model'.*: set a format of codes, or"
    ):
        parse(chunk="exact")
    with pytest.raises(
        OptionsError, match=r"ranking='int8' means nothing with format 'kivi4'.*: set format 'int4', or"
    ):
        parse(format="kivi4", ranking="int8")
    assert parse(format="kivi2", chunk="exact").chunk == "exact"
    assert parse(format="int4", ranking="int8").ranking == "int8"


@pytest.mark.parametrize("name", ["k", "min_k", "local", "dense_below", "r"])
def test_a_number_beyond_what_kernels_count_is_refused(name: str) -> None:
    for n in (MOST_TOKENS + 1, 2**31, 2**63, 2**200):
        with pytest.raises(OptionsError, match=rf"{name}={n} is not usable.*{MOST_TOKENS}"):
            parse_options({"sparq": {name: n}})
    assert getattr(parse_options({"sparq": {name: MOST_TOKENS}}), name) == MOST_TOKENS


@pytest.mark.parametrize("name", ["budget", "recent", "sinks"])
def test_a_budget_beyond_what_kernels_count_is_refused(name: str) -> None:
    for n in (MOST_TOKENS + 1, 2**31, 2**63, 2**200):
        with pytest.raises(OptionsError, match=rf"{name}={n} is not usable.*{MOST_TOKENS}"):
            parse_options({"sparq": {name: n}}, "h2o")
