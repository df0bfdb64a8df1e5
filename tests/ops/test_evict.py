"""`evict`: who stays, by hand and by a second definition; where they go, byte by byte; what must not change."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import HUGE_BYTE, KERNELS, Case, World, build, each, int32, load
from tests.ops.cases import device_of as device
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from vllm_sparq.ops.dense_decode.reference import cached_tokens
from vllm_sparq.ops.evict import evict as contract
from vllm_sparq.ops.evict.reference import evict as reference
from vllm_sparq.ops.write.reference import write as reference_write
from vllm_sparq.retention import Rank

LONGER = (7, 40, 100, 333)
"""Tokens more than a shape's own, so that there is something to evict."""


def tracked(case: Case, *, attention: bool) -> Case:
    lens = tuple(s + LONGER[i % len(LONGER)] + case.block_size for i, s in enumerate(case.lens))
    return replace(case, positions=True, attention=attention, lens=lens)


def with_scores(case: Case, *, poison: int = 0xFF, on: str = "cpu", shuffle: int = 0) -> World:
    """A world whose tokens have had attention: few different values, so that there are ties, and a NaN in each head."""
    world = build(case, poison=poison, device=on, shuffle=shuffle)
    if not case.attention:
        return world
    generator = case.generator()
    for b, n_tokens in enumerate(case.lens):
        page, place = slots_of(world, b, n_tokens)
        for head in range(case.kv_heads):
            scores = torch.randint(0, max(n_tokens // 3, 2), (n_tokens,), generator=generator).float() / 7
            scores[n_tokens // 2] = torch.nan
            world.pages.attention[page, head, place] = scores.to(on)
    return world


def slots_of(world: World, request: int, n_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = torch.arange(n_slots, device=world.buffer.device)
    return world.block_table[request].long()[slots // world.case.block_size], slots % world.case.block_size


def kept_lens(case: Case, keep: float) -> list[int]:
    """About ``keep`` of each request; whole blocks in quantized formats; all of the first request."""
    unit = case.block_size if case.format != "model" else 1
    return [case.lens[0], *(max(int(s * keep) // unit * unit, unit if s > unit else 0) for s in case.lens[1:])]


def run_evict(
    world: World, run: Callable[..., None], kept: list[int], *, sinks: int, recent: int, rank: Rank | None = None
) -> None:
    """``rank`` is that of the pages, if not given."""
    case, on = world.case, world.buffer.device
    recent_from = int32([s - recent for s in case.lens]).to(on)
    seq_lens = world.seq_lens[: len(case.lens)].contiguous()
    rank = rank or ("attention" if case.attention else "age")
    most = max((n for n, s in zip(kept, case.lens, strict=True) if n < s), default=0)
    lens = seq_lens, int32(kept).to(on), recent_from
    run(world.pages, world.block_table, *lens, sinks=sinks, rank=rank, most_kept=most)


def assert_same_tokens(got: World, want: World, kept: list[int]) -> None:
    """Every kept slot, and what its page derives from it."""
    layout, n = got.case.layout, got.case.block_size
    names = {"positions", "attention"} & set(layout.parts)
    names |= {"keys", "values"} if layout.quantized is None else {"value_codes", "value_scales"}
    if layout.quantized is not None and not layout.channel_keys:
        names |= {"key_codes", "key_scales"}
    for b, n_kept in enumerate(kept):
        page, place = slots_of(got, b, n_kept)
        for name in sorted(names):
            a, z = getattr(got.pages, name)[page, :, place], getattr(want.pages, name)[page, :, place]
            torch.testing.assert_close(
                a, z, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
        full = got.block_table[b, : n_kept // n].long()
        for name in [part for part in ("ranking", "scales", "key_codes", "key_scales") if part in layout.parts]:
            assert torch.equal(getattr(got.pages, name)[full], getattr(want.pages, name)[full]), name
        if layout.value_sum:
            begun = got.block_table[b, : -(-n_kept // n)].long()
            bound = tolerances.value_sum(n_kept, want.pages.value_sum[begun].abs() + n_kept)
            difference = (got.pages.value_sum[begun] - want.pages.value_sum[begun]).abs()
            assert (difference <= bound).all()


CASES = [tracked(case, attention=i % 3 > 0) for i, case in enumerate((*SHAPES, *FORMATS))]
FEW = [tracked(case, attention=i % 3 > 0) for i, case in enumerate((*TINY[:4], *TINY_FORMATS))]


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "case"), each(CASES, tiny=FEW, implementations=KERNELS))
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_kernels_are_the_reference(implementation: str, case: Case, keep: float) -> None:
    kept = kept_lens(case, keep)
    got, want = with_scores(case, on=device(implementation)), with_scores(case)
    run_evict(got, load("evict", implementation), kept, sinks=2, recent=5)
    run_evict(want, reference, kept, sinks=2, recent=5)
    got.buffer, got.block_table = got.buffer.cpu(), got.block_table.cpu()
    got.pages = replace(got.pages, data=got.pages.data.cpu())
    assert_same_tokens(got, want, kept)


STEPWISE = Case(positions=True, attention=True, ranking=None, value_sum=False, lens=(40, 64, 65), block_size=32)


@pytest.mark.parametrize(("implementation", "case"), each([STEPWISE], implementations=KERNELS))
def test_one_token_goes_at_a_time(implementation: str, case: Case) -> None:
    """Thirty steps, each of which drops a token and brings one: order of moves and stale bytes would add up."""
    on = device(implementation)
    worlds = with_scores(case, on=on), with_scores(case)
    generator = torch.Generator().manual_seed(5)
    for step in range(30):
        new = torch.randn(2, len(case.lens), case.kv_heads, case.head_size, generator=generator)
        heat = torch.rand(len(case.lens), case.kv_heads, max(case.lens), generator=generator)
        for world, names in zip(worlds, ((implementation, on), ("reference", "cpu")), strict=True):
            kept = [s - 1 for s in case.lens]
            seq_lens, where = int32(case.lens).to(names[1]), world.pages.data.device
            recent_from = int32([s + step - 6 for s in case.lens]).to(where)
            load("evict", names[0])(
                world.pages, world.block_table, seq_lens, int32(kept).to(where), recent_from, sinks=1, rank="attention"
            )
            starts = torch.arange(len(case.lens) + 1, dtype=torch.int32, device=where)
            positions = int32([s + step for s in case.lens]).to(where)
            key, value = new.to(where)
            reference_write(key, value, world.pages, world.block_table, starts, seq_lens, positions)
            for b, n_tokens in enumerate(case.lens):
                page, place = slots_of(world, b, n_tokens)
                world.pages.attention[page, :, place] += heat[b, :, :n_tokens].T.to(where)
    got, want = worlds
    got.block_table, got.pages = got.block_table.cpu(), replace(got.pages, data=got.pages.data.cpu())
    assert_same_tokens(got, want, list(case.lens))


@pytest.mark.parametrize(("implementation", "rank"), each(get_args(Rank), implementations=KERNELS))
def test_each_rank_is_the_reference(implementation: str, rank: Rank) -> None:
    """Over the same pages, so that a kernel which does not know a rank is found."""
    case = Case(positions=True, attention=True, ranking=None, value_sum=False, lens=(1, 40, 37))
    got, want = with_scores(case, on=device(implementation)), with_scores(case)
    for world, name in ((got, implementation), (want, "reference")):
        run_evict(world, load("evict", name), [1, 20, 36], sinks=2, recent=3, rank=rank)
    got.block_table, got.pages = got.block_table.cpu(), replace(got.pages, data=got.pages.data.cpu())
    assert_same_tokens(got, want, [1, 20, 36])


@pytest.mark.parametrize("implementation", [pytest.param(name, id=name) for name in (*KERNELS, "reference")])
def test_by_hand(implementation: str) -> None:
    """Ten tokens, five stay: token 0 (a sink), 8 and 9 (recent), and those with scores 9 and, of two 7s, the older."""
    case = Case(heads=1, kv_heads=1, attention=True, positions=True, ranking=None, value_sum=False, lens=(10,))
    world = build(case, device=device(implementation))
    page = int(world.block_table[0, 0])
    world.pages.attention[page, 0, :10] = torch.tensor([0, 1, 7, 2, 7, 3, 9, 4, 0, 0.0], device=world.buffer.device)
    keys = world.pages.keys[page, 0, :10].clone()
    run_evict(world, load("evict", implementation), [5], sinks=1, recent=2)
    # Slots 1, 3 and 4 are free; tokens 6, 8 and 9, which lie after, take them in this order.
    assert world.pages.positions[page, 0, :5].tolist() == [0, 6, 2, 8, 9]
    assert world.pages.attention[page, 0, :5].tolist() == [0, 9, 7, 0, 0]
    assert torch.equal(world.pages.keys[page, 0, :5], keys[[0, 6, 2, 8, 9]])


@pytest.mark.parametrize("implementation", [pytest.param(name, id=name) for name in (*KERNELS, "reference")])
@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
def test_by_age_the_oldest_go(implementation: str, attention: bool) -> None:
    """Whether pages add up attention or not: a page's parts do not decide who stays."""
    case = Case(positions=True, attention=attention, ranking=None, value_sum=False, lens=(37,))
    world = with_scores(case, on=device(implementation))
    run_evict(world, load("evict", implementation), [20], sinks=3, recent=1, rank="age")
    page, place = slots_of(world, 0, 20)
    for head in range(case.kv_heads):
        stayed = world.pages.positions[page, head, place].tolist()
        assert sorted(stayed) == [0, 1, 2, *range(20, 37)]


@pytest.mark.parametrize("implementation", [pytest.param(name, id=name) for name in (*KERNELS, "reference")])
@pytest.mark.parametrize("fmt", ["model", "int4", "kivi4"])
def test_nothing_else_is_touched(implementation: str, fmt: str) -> None:
    """Pages of others, poison between them, and where the pages lie must not matter."""
    case = Case(
        positions=True,
        attention=True,
        format=fmt,
        ranking=None if fmt == "kivi4" else "int4",
        lens=(100, 90),
        block_size=32,
    )
    case = replace(case, value_sum=fmt != "kivi4")
    results = []
    for shuffle, poison in ((0, 0xFF), (1, HUGE_BYTE)):
        world = with_scores(case, on=device(implementation), shuffle=shuffle, poison=poison)
        before = world.buffer.clone()
        run_evict(world, load("evict", implementation), [100, 64], sinks=0, recent=3)
        own = world.block_table[1, :-2].long()
        own = own[own < len(world.pages.data)]
        after = world.buffer.clone()
        data = world.pages.data
        pages_after, pages_before = (
            of.as_strided(data.shape, data.stride(), data.storage_offset()) for of in (after, before)
        )
        assert not pages_after[own].equal(pages_before[own])
        pages_after[own] = pages_before[own]
        assert after.equal(before)
        results.append([cached_tokens(world.pages, world.block_table[1].cpu(), 64, h) for h in range(2)])
    for a, z in zip(results[0], results[1], strict=True):
        assert torch.equal(a[0], z[0])
        assert torch.equal(a[1], z[1])


def test_many_small_evictions_are_one_large_one() -> None:
    """Without new attention in between, dropping one token fifty times drops what dropping fifty at once drops."""
    case = Case(positions=True, attention=True, ranking=None, value_sum=False, lens=(120,))
    small, large = with_scores(case), with_scores(case)
    for n in range(120, 70, -1):
        reference(small.pages, small.block_table, int32([n]), int32([n - 1]), int32([110]), sinks=2, rank="attention")
    reference(large.pages, large.block_table, int32([120]), int32([70]), int32([110]), sinks=2, rank="attention")
    page, place = slots_of(small, 0, 70)
    for head in range(case.kv_heads):
        one, other = (sorted(world.pages.positions[page, head, place].tolist()) for world in (small, large))
        assert one == other


def test_attention_that_was_not_added_up_cannot_decide() -> None:
    world = build(Case(positions=True, lens=(37,)))
    lens = int32([37]), int32([20]), int32([36])
    with pytest.raises(ValueError, match=r"rank='attention' needs pages that add it up; .* use rank='age'"):
        contract(world.pages, world.block_table, *lens, sinks=0, rank="attention")
    with pytest.raises(ValueError, match=re.escape(f"rank must be one of {[*get_args(Rank)]}, got 'luck'")):
        contract(world.pages, world.block_table, *lens, sinks=0, rank="luck")  # type: ignore[arg-type]
