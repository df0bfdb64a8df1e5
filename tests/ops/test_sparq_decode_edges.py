"""`sparq_decode` where vectors, units and pieces of work do not come out even."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.cases import Case, load
from tests.ops.sparq_checks import assert_right
from vllm_sparq.reads import SparqRead


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("block_size", [16, 48, 144])
@pytest.mark.parametrize(
    ("heads", "head_size", "dtype", "r"),
    [(1, 64, torch.float32, 16), (5, 64, torch.float32, 3), (2, 256, torch.bfloat16, 144)],
)
def test_half_a_page_of_codes_is_no_whole_vector(
    implementation: str, block_size: int, heads: int, head_size: int, dtype: torch.dtype, r: int
) -> None:
    """Tokens of low nibbles lie before those of high ones: what is stored beyond their end would fall upon these."""
    case = Case(
        heads=heads, kv_heads=1, head_size=head_size, block_size=block_size, dtype=dtype, lens=(4 * block_size + 5,)
    )
    read = SparqRead(r=r, min_k=block_size, local=0, alpha_floor=0.5)
    assert_right(load("sparq_decode", implementation), case, case.tokens(), read)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("ranking", ["int4", "int8"])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_channel_that_is_not_chosen_does_not_matter(implementation: str, ranking: str, heads: int) -> None:
    """However wide its range is: weights are multiples of a unit that goes by the ranges of those chosen."""
    case = Case(heads=heads, kv_heads=1, block_size=64, dtype=torch.float16, ranking=ranking, lens=(330,))
    tokens = case.tokens()
    tokens.query[0][..., 0] = 0
    tokens.key[0][::7, :, 0] = 30000
    read = SparqRead(r=8, min_k=40, local=0, alpha_floor=1.0)
    assert_right(load("sparq_decode", implementation), case, tokens, read)


@pytest.mark.parametrize("format", ["model", "int4", "kivi4"])
@pytest.mark.parametrize("more", [{}, {"group_reduce": "probs"}, {"mass": 0.9}], ids=str)
def test_what_is_read_of_a_cut_context_is_cut_too(format: str, more: dict[str, Any]) -> None:
    """Pieces of codes alone, and one that ends with staged tokens; beside a context that is not cut."""
    case = Case(heads=4, kv_heads=1, head_size=64, block_size=128, lens=(2100, 40), format=format)
    read = SparqRead(r=16, min_k=1500, alpha_floor=0.1, **more)
    assert_right(load("sparq_decode", "cpu"), case, case.tokens(), read)


@pytest.mark.parametrize("format", ["model", "int8", "int4", "kivi4"])
@pytest.mark.parametrize("group", [5, 6, 7, 9])
def test_query_groups_of_any_size(format: str, group: int) -> None:
    """What ranks and what attends to a list take a few heads at a time, evenly."""
    ranking = None if format == "kivi4" else "int4"
    case = Case(
        heads=2 * group,
        kv_heads=2,
        block_size=64,
        dtype=torch.bfloat16,
        format=format,
        ranking=ranking,
        value_sum=True,
        lens=(333,),
    )
    read = SparqRead(r=16, min_k=100, alpha_floor=0.1, group_reduce="probs")
    assert_right(load("sparq_decode", "cpu"), case, case.tokens(), read)
