"""`represent`: sums of queries, and the keys they choose, against numpy over the tokens; the same bits in any steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops.cases import HUGE_BYTE, NAN_BYTE, THREADS, Case, Tokens, World, build, int32, threaded
from tests.ops.oracle import Array
from vllm_sparq.ops import represent as contract
from vllm_sparq.ops.dispatch import OVERRIDE
from vllm_sparq.ops.represent import cpu, implementation, query_sums, reference

RUNS: dict[str, Callable[..., None]] = {
    "reference": reference.represent,
    "cpu": threaded(cpu.represent, THREADS),
}
BASE = Case(ranking="representatives", value_sum=False, heads=6, kv_heads=2, lens=(143, 144, 145, 15, 0, 300))
CASES = (
    BASE,
    replace(BASE, block_size=128, dtype=torch.bfloat16, lens=(400, 160)),
    replace(BASE, block_size=48, dtype=torch.float16, head_size=80, heads=2, lens=(250, 7)),
    replace(BASE, block_size=32, dtype=torch.bfloat16, head_size=256, heads=1, kv_heads=1, lens=(200,)),
)
SPAN, WINDOW, KEYS = 16, 8, 4


def filled(case: Case, run: Callable[..., None], cuts: tuple[int, ...] = (), poison: int = NAN_BYTE) -> World:
    """All tokens of the case in their pages, and ``run`` over their queries: up to each of the cuts, then the rest."""
    whole = replace(case, new=case.lens)
    return brought(build(whole, poison=poison), whole.tokens(), run, cuts)


def brought(world: World, tokens: Tokens, run: Callable[..., None], cuts: tuple[int, ...]) -> World:
    lens, done = world.case.lens, [0] * len(world.case.lens)
    for cut in (*cuts, max(lens)):
        upto = [min(cut, s) for s in lens]
        padding = torch.full((3, *tokens.query[0].shape[1:]), torch.nan, dtype=world.case.dtype)
        rows = torch.cat([*(q[a:z] for q, a, z in zip(tokens.query, done, upto, strict=True)), padding])
        starts = int32([0, *(torch.tensor(upto) - torch.tensor(done)).cumsum(0).tolist()])
        run(rows, world.pages, world.block_table, starts, int32(upto))
        done = upto
    return world


def summed(case: Case, tokens: Tokens, b: int, g: int, first: int, stop: int) -> Array:
    """[D]: the queries of a group's tokens ``first .. stop``."""
    group = case.heads // case.kv_heads
    return tokens.query[b][first:stop, g * group : (g + 1) * group].double().sum((0, 1)).numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_representatives_are_those_of_the_paper(run: str, case: Case) -> None:
    """A span whose window is full has the mean of its best keys, twice; all others the sum of their queries."""
    world, tokens = filled(case, RUNS[run]), replace(case, new=case.lens).tokens()
    per_block, rounding = case.block_size // SPAN, {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for b, s in enumerate(case.lens):
        for g, span in [(g, span) for g in range(case.kv_heads) for span in range(-(-s // SPAN))]:
            page, place = int(world.block_table[b, span // per_block]), span % per_block
            end = (span + 1 + WINDOW) * SPAN
            if s < end:
                got = query_sums(world.pages)[page, g, place].double().numpy()
                np.testing.assert_allclose(
                    got, summed(case, tokens, b, g, span * SPAN, min(s, span * SPAN + SPAN)), rtol=1e-4, atol=1e-4
                )
                continue
            its = tokens.key[b][span * SPAN : (span + 1) * SPAN, g].double().numpy()
            scores = its @ summed(case, tokens, b, g, (span + 1) * SPAN, end)
            order = np.sort(scores)[::-1]
            assert order[KEYS - 1] - order[KEYS] > 1e-3, "a tie that rounding may turn"
            want = its[scores >= order[KEYS - 1]].mean(0)
            for row in world.pages.ranking[page, g, place].double().numpy():
                np.testing.assert_allclose(row, want, rtol=rounding[case.dtype], atol=rounding[case.dtype])


@pytest.mark.parametrize("run", RUNS)
def test_steps_do_not_matter(run: str) -> None:
    """A token at a time around the ends of spans and windows, or all at once: the same bytes."""
    whole = filled(BASE, RUNS[run])
    for cuts in ((5, 16, 17, 143, 144, 150, 299), tuple(range(120, 300))):
        assert filled(BASE, RUNS[run], cuts).buffer.equal(whole.buffer)


@pytest.mark.parametrize("run", RUNS)
def test_only_its_own_spans_change(run: str) -> None:
    """Whatever lay there before; and nothing but the ranking of the spans that tokens have begun."""
    case = replace(BASE, block_size=32)
    over_nan, over_huge = (filled(case, RUNS[run], poison=poison) for poison in (NAN_BYTE, HUGE_BYTE))
    before = build(replace(case, new=case.lens)).buffer
    part = case.layout.parts["ranking"]
    changed = (over_nan.buffer != before).nonzero().flatten()
    stride = over_nan.pages.data.stride(0)
    in_page = (changed - 128) % stride % over_nan.pages.data.stride(1)
    assert bool(((in_page >= part.offset) & (in_page < part.offset + part.nbytes)).all())
    for b, s in enumerate(case.lens):
        pages = over_nan.block_table[b, : -(-s // 32)].long()
        one, other = (query_sums(world.pages)[pages].transpose(1, 2).flatten(0, 1) for world in (over_nan, over_huge))
        begun = -(-s // SPAN)
        assert one[:begun].equal(other[:begun])
        assert one[begun:].isnan().all()


def test_by_hand() -> None:
    """Queries before a window and after it have no say, the last one in it has; keys that are not finite are the worst.

    K of token t is t in channel t, but of the first token, which is NaN, so a query along some channels chooses their
    tokens.
    """
    case = Case(ranking="representatives", value_sum=False, heads=2, kv_heads=1, lens=(161,), new=(161,))
    tokens = case.tokens()
    tokens.key[0][:16, 0] = torch.cat([torch.arange(16.0).diag(), torch.zeros(16, 48)], 1)
    tokens.key[0][0] = torch.nan
    tokens.query[0][:] = 0
    tokens.query[0][15, :, 1] = 1e9  # of the span itself
    tokens.query[0][144, :, 1] = 1e9  # after its window, 16 .. 143
    tokens.query[0][16, 0, 15], tokens.query[0][16, 1, 14] = 1, 1  # heads of a group count alike
    tokens.query[0][100, 0, 13], tokens.query[0][143, 1, 2] = 1, 1
    for run in RUNS.values():
        world = brought(build(case, tokens), tokens, run, ())
        want = torch.zeros(64)
        want[[2, 13, 14, 15]] = torch.tensor([2.0, 13.0, 14.0, 15.0]) / 4
        assert world.pages.ranking[int(world.block_table[0, 0]), 0, 0].equal(want.expand(2, -1))


def test_ties_go_to_the_oldest_and_infinite_elements_count_as_zero() -> None:
    case = Case(ranking="representatives", value_sum=False, heads=1, kv_heads=1, lens=(144,), new=(144,))
    tokens = case.tokens()
    tokens.query[0][:] = 0
    tokens.key[0][:] = torch.arange(144.0)[:, None, None]
    tokens.key[0][2, 0, 5] = torch.inf  # 0 * inf: a score that is NaN, so tokens 0, 1, 3 and 4 are first
    for run in RUNS.values():
        world = brought(build(case, tokens), tokens, run, ())
        assert world.pages.ranking[int(world.block_table[0, 0]), 0].unique().tolist() == [2.0]
    tokens.key[0][:16] = torch.inf
    for run in RUNS.values():
        world = brought(build(case, tokens), tokens, run, ())
        assert world.pages.ranking[int(world.block_table[0, 0]), 0].unique().tolist() == [0.0]


def test_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert implementation() is cpu.represent
    monkeypatch.setenv(OVERRIDE, "reference")
    assert implementation() is reference.represent


def test_the_contract_checks() -> None:
    world = build(replace(BASE, new=BASE.lens))
    given = dict(
        query=world.query,
        pages=world.pages,
        block_table=world.block_table,
        query_start_loc=world.query_start_loc,
        seq_lens=world.seq_lens,
    )
    contract.represent(**given)
    bounds = build(replace(BASE, ranking="bounds")).pages
    for changed, message in (
        ({"query": world.query[:, :5]}, "query must be"),
        ({"pages": bounds}, "needs pages with ranking 'representatives'; this layout has 'bounds'"),
        ({"pages": build(replace(BASE, format="int8")).pages}, "must be in the model's type, got format 'int8'"),
        ({"seq_lens": world.seq_lens[:2]}, "seq_lens has 2 entries for 6 requests"),
        ({"query_start_loc": world.query_start_loc.long()}, "query_start_loc must be"),
    ):
        with pytest.raises(ValueError, match=message):
            contract.represent(**{**given, **changed})
