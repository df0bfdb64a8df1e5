"""When tokens go and how many: the closed forms against counting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparq.config import OptionsError, check_budget, parse_options
from vllm_sparq.retention import Arrival, Phase, Retention


@st.composite
def retentions(draw: st.DrawFn) -> Retention:
    block_size = draw(st.sampled_from([16, 64, 128]))
    return Retention(
        budget=draw(st.one_of(st.integers(1, 900), st.floats(0.01, 1.0))),
        recent=draw(st.one_of(st.none(), st.integers(1, 50))),
        sinks=draw(st.integers(0, 9)),
        rank="attention",
        bounded=draw(st.booleans()),
        interval=draw(st.sampled_from([1, block_size])),
        block_size=block_size,
    )


@settings(max_examples=300, deadline=None)
@given(retentions(), st.integers(1, 1200), st.integers(0, 500), st.sets(st.integers(1, 500), max_size=3))
def test_arrivals_are_what_counting_finds(
    retention: Retention, prompt_len: int, n_answer: int, shrink_at: set[int]
) -> None:
    """One token after another; budgets are lowered now and then, as the scheduler does."""
    budget, taken = retention.budget_of(prompt_len), 0
    phase: Phase | None = None
    for position in range(prompt_len + n_answer):
        if position - prompt_len in shrink_at and budget - retention.block_size >= retention.least_budget:
            budget -= retention.block_size
            phase = retention.shrunk(phase or retention.answer(prompt_len), position, budget)
        before = taken
        if position < prompt_len:
            if retention.bounded and position % retention.segment == 0:
                taken = min(taken, budget)
        elif taken >= budget:
            taken = budget - retention.interval
        arrival = retention.arrival(position, prompt_len, phase)
        assert arrival == Arrival(held=before, kept=taken)
        if arrival.n_evicted:
            assert taken >= retention.sinks + retention.recent_of(budget) - 1
        taken += 1
        answering = position >= prompt_len
        assert taken <= retention.most_slots(position + 1, prompt_len, answering=answering, phase=phase)
        if answering:
            assert taken <= budget


@settings(max_examples=100, deadline=None)
@given(retentions(), st.integers(1, 1200), st.integers(0, 1500))
def test_nothing_is_evicted_between_cuts(retention: Retention, prompt_len: int, position: int) -> None:
    following = retention.next_cut(position, prompt_len)
    assert following > position
    for later in range(position + 1, following):
        assert retention.arrival(later, prompt_len).n_evicted == 0


def test_by_hand() -> None:
    h2o = Retention(budget=100, recent=50, sinks=0, rank="attention", bounded=False, interval=1, block_size=128)
    assert h2o.arrival(299, 300) == Arrival(held=299, kept=299)
    assert h2o.arrival(300, 300) == Arrival(held=300, kept=99)
    assert h2o.arrival(301, 300) == Arrival(held=100, kept=99)
    assert h2o.most_slots(300, 300, answering=False) == 300
    assert h2o.most_slots(5000, 300, answering=True) == 100
    blocks = Retention(budget=0.5, recent=None, sinks=4, rank="attention", bounded=True, interval=128, block_size=128)
    assert blocks.budget_of(1000) == 512
    assert blocks.recent_of(512) == 256
    assert blocks.arrival(768, 1000) == Arrival(held=768, kept=512)
    assert blocks.arrival(769, 1000) == Arrival(held=513, kept=513)
    assert blocks.arrival(1000, 1000) == Arrival(held=512 + 232, kept=384)
    assert blocks.most_slots(4000, 1000, answering=False) == 512 + 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 10}, "budget=10 means nothing while all tokens stay"),
        ({"retention": "window", "recent": 5}, "recent=5 means nothing with retention 'window'"),
        ({"retention": "heavy_hitter", "budget": 0}, "budget=0 is not usable: a whole number of tokens from 1"),
        ({"retention": "heavy_hitter", "budget": -3}, "budget=-3 is not usable"),
        ({"retention": "heavy_hitter", "budget": 1.5}, "budget=1.5 is not usable"),
        ({"retention": "heavy_hitter", "budget": 64, "recent": 60, "sinks": 4, "read": "dense"}, "budget >= 65"),
        ({"retention": "heavy_hitter", "budget": 64, "recent": 64, "read": "dense"}, "budget >= 65"),
        ({"pressure": "evict"}, "pressure='evict' means nothing"),
        ({"retention": "all", "prefill": "bounded"}, "prefill='bounded' means nothing"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        parse_options({"sparq": options})


def test_a_block_at_a_time_needs_room_for_a_block() -> None:
    options = parse_options({"sparq": {"retention": "heavy_hitter", "budget": 128, "recent": 64, "format": "int4"}})
    check_budget(options, 32)
    with pytest.raises(OptionsError, match="128 go at a time, so use budget >= 256, or a smaller --block-size"):
        check_budget(options, 128)
