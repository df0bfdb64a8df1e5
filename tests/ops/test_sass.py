"""Instructions of the decode kernels, in the machine code for H100: what a change may not make worse unseen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ops.test_triton_aot import run_ahead_of_time, triton_version

pytestmark = [pytest.mark.slow, pytest.mark.long]

MOST_PER_TOKEN = {
    ("model", "score_kernel"): 2.25,
    ("model", "partition_kernel"): 1.4,
    ("model", "attend_kernel of a list"): 37.0,
    ("model", "attend_kernel"): 23.0,
    ("int8", "attend_kernel"): 45.5,
    ("int4", "attend_kernel"): 42.0,
    ("kivi4", "attend_kernel"): 48.0,
}
"""Warp-instructions per token and KV head, by Triton 3.7.1, 3.8.0 and 3.9. Where fewer are reached, lower the bar."""


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    if triton_version() < (3, 7):
        pytest.skip("the bars are of Triton 3.7.1 and newer")
    return {(row["format"], row["kernel"]): row for row in run_ahead_of_time("tests.ops.sass", "--json")}


def test_no_kernel_takes_more_instructions(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert rows.keys() == MOST_PER_TOKEN.keys()
    too_many = {key: row["per_token"] for key, row in rows.items() if row["per_token"] > MOST_PER_TOKEN[key]}
    assert not too_many
    assert min(row["per_token"] for row in rows.values()) > 0.5, "the loop was not found"


def test_nothing_spills_and_loads_overlap(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert not [row for row in rows.values() if row["spilled"]]
    attend = [row for (_, kernel), row in rows.items() if "attend" in kernel]
    assert len(attend) == 5
    assert all(row["double"] for row in attend), "K and V have one buffer each: a tile is loaded only when one is done"
