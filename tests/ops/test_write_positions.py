"""`write` where tokens may be evicted: which token each slot holds, and that its score begins at nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops.cases import KERNELS, Case, build, each, int32, load
from ops.cases import device_of as device
from ops.shapes import TINY, TINY_FORMATS
from ops.test_evict import slots_of

from vllm_sparq.ops.write.reference import write as reference

NEW = (40, 1, 5, 0, 69)
"""Tokens that each request of a case brings: first and last slots of pages, and several pages."""


def tracked(case: Case, *, scores: bool) -> Case:
    lens = tuple(s + 70 for s in case.lens)
    return replace(case, positions=True, scores=scores, lens=lens, new=NEW[: len(lens)])


CASES = [tracked(case, scores=i % 2 == 0) for i, case in enumerate((*TINY, *TINY_FORMATS))]


@pytest.mark.parametrize("evicted", [None, 1000], ids=["slots", "positions"])
@pytest.mark.parametrize(("implementation", "case"), each(CASES, implementations=KERNELS))
def test_kernels_are_the_reference(implementation: str, case: Case, evicted: int | None) -> None:
    """Of the new tokens, and of those before them, which keep theirs."""
    got, want = build(case, written="context", device=device(implementation)), build(case, written="context")
    for world, run in ((got, load("write", implementation)), (want, reference)):
        firsts = None if evicted is None else int32([evicted * (b + 1) for b in range(len(case.lens))])
        where = world.buffer.device
        tensors = world.key, world.value, world.pages, world.block_table, world.query_start_loc, world.seq_lens
        run(*tensors, None if firsts is None else firsts.to(where))
    for b, n_tokens in enumerate(case.lens):
        page, place = slots_of(want, b, n_tokens)
        for name in {"positions", "scores"} & set(case.layout.parts):
            a, z = (getattr(world.pages, name).cpu()[page, :, place] for world in (got, want))
            assert torch.equal(a, z), name
    first, n_new = case.lens[0] - case.new[0], case.new[0]
    page, place = slots_of(want, 0, case.lens[0])
    expected = torch.arange(n_new) + (first if evicted is None else evicted)
    assert torch.equal(want.pages.positions[page, 0, place][first:].long(), expected)
