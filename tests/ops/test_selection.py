"""How selection on a GPU narrows its candidates: sinks and equal scores make nobody wait."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.ops.cases import Case, Tokens, build, load
from tests.ops.cases import device_of as device
from tests.ops.sparq_checks import assert_right, tokens_read
from vllm_sparq.ops.sparq_decode import triton as sparq
from vllm_sparq.reads import SparqRead

ON = device("triton")


def tokens_along(case: Case, levels: torch.Tensor, noise: float) -> Tokens:
    """Keys along the query: the score of a token is a multiple of its level, but for noise."""
    tokens = case.tokens()
    direction = tokens.query[0][0, 0].sign()
    tokens.query[0][0] = tokens.query[0][0].abs() * direction
    tokens.key[0] = (levels[:, None, None] * direction + tokens.key[0] * noise).to(case.dtype)
    return tokens


def last_bin(case: Case, tokens: Tokens, read: SparqRead) -> int:
    """Tokens in the bin in which the search for the last ones to read goes on."""
    world = build(case, tokens, device=ON)
    query = world.query[:1]
    plan = sparq.make_plan(query, world.pages, world.block_table, read)
    work = sparq.Scratch(plan, ON)
    sparq.score(plan, work, query, world.pages, world.block_table, world.seq_lens, case.scale, None, None)
    counts = work.counts[0].sum(0)
    assert counts.sum() == case.lens[0]
    above = counts.flip(0).cumsum(0).flip(0)
    return int(counts[(above >= read.n_selected(case.lens[0])).nonzero().max()])


@pytest.mark.parametrize("sink", [0.0, 300.0, 10_000.0])
def test_a_sink_does_not_spread_the_bins(sink: float) -> None:
    """One token of a thousand with a score far above all others leaves few candidates."""
    case = Case(heads=1, kv_heads=1, head_size=128, block_size=128, lens=(1100,), ranking="model", dtype=torch.float32)
    levels = torch.randn(1100, generator=torch.Generator().manual_seed(0))
    levels[0] += sink
    read = SparqRead(r=32, min_k=70, local=4)
    assert 0 < last_bin(case, tokens_along(case, levels, 2**-6), read) < 60


@pytest.mark.parametrize("kind", ["crowd", "crowd of equals"])
def test_a_crowded_bin_is_searched_exactly(kind: str) -> None:
    """Scores far from each other in two clusters: the bin of the smaller ones holds more than the list has room for."""
    case = Case(heads=1, kv_heads=1, head_size=128, block_size=32, lens=(300,), ranking="model", dtype=torch.float32)
    levels = torch.randn(300, generator=torch.Generator().manual_seed(0)) / 512
    great = torch.arange(300) % 10 < 3
    levels[great] += 4.0
    tokens, read = tokens_along(case, levels, 2**-14), SparqRead(r=32, min_k=120, local=4)
    if kind == "crowd of equals":
        tokens.key[0][~great] = 0.0
    world = build(case, tokens, device=ON)
    plan = sparq.make_plan(world.query[:1], world.pages, world.block_table, read)
    assert last_bin(case, tokens, read) > plan.max_candidates
    run = load("sparq_decode", "triton")
    assert_right(run, case, tokens, read, ON)
    if kind == "crowd of equals":
        oldest = (~great).nonzero().flatten().tolist()[: 121 - 5 - 90]  # 5 are the newest, and 90 are great
        assert tokens_read(run, world, read)[0, 0].tolist() == sorted(
            [*great.nonzero().flatten().tolist(), *oldest, *range(295, 300)]
        )
