"""`write` into pages that say which token a slot holds: positions, and scores that begin at zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.cases import ALL, Case, build, int32, load
from tests.ops.cases import device_of as device

CASES = (
    Case(positions=True, lens=(33, 0, 17, 70), new=(33, 0, 1, 40)),
    Case(attention=True, ranking=None, value_sum=False, block_size=80, lens=(150, 80, 81), new=(100, 80, 1)),
    Case(attention=True, format="int4", heads=2, kv_heads=1, block_size=32, lens=(64, 0, 70), new=(1, 0, 50)),
)


@pytest.mark.parametrize("shifted", [False, True], ids=["slots", "positions"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ALL)
def test_arrivals_are_noted(implementation: str, case: Case, shifted: bool) -> None:
    """The new tokens' entries alone, from their slots or from the position that is given."""
    world = build(case, written="context", device=device(implementation))
    parts = ("positions", "attention") if case.attention else ("positions",)
    for name in parts:
        getattr(world.pages, name).fill_(7)
    firsts = [s - n + (1000 * b if shifted else 0) for b, (s, n) in enumerate(zip(case.lens, case.new, strict=True))]
    arguments = world.block_table, world.query_start_loc, world.seq_lens
    given = int32(firsts).to(world.buffer.device) if shifted else None
    load("write", implementation)(world.key, world.value, world.pages, *arguments, given)
    for b, (context, n_new) in enumerate(zip(case.lens, case.new, strict=True)):
        slots = torch.arange(context)
        page, place = world.block_table[b].cpu().long()[slots // case.block_size], slots % case.block_size
        old = slots < context - n_new
        want = torch.where(old, 7, firsts[b] + slots - (context - n_new)).int()
        tracked = world.pages.positions.cpu()[page, :, place]
        assert torch.equal(tracked, want[:, None].expand_as(tracked))
        if case.attention:
            tracked = world.pages.attention.cpu()[page, :, place]
            assert torch.equal(tracked, torch.where(old, 7.0, 0.0)[:, None].expand_as(tracked))


@pytest.mark.parametrize("implementation", ALL)
def test_slots_after_the_last_token_keep_their_notes(implementation: str) -> None:
    case = replace(CASES[0], lens=(5,), new=(2,))
    world = build(case, written="context", device=device(implementation))
    page = int(world.block_table[0, 0])
    before = world.pages.positions[page].clone()
    world.write(load("write", implementation))
    assert torch.equal(world.pages.positions[page, :, 5:], before[:, 5:])
