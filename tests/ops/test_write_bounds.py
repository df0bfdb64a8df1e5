"""`write` on pages with bounds of spans: the least and the largest K of each span and channel, and no other byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops.cases import Case, Tokens, World, build, each, has, load, write_in_chunks
from tests.ops.cases import device_of as device
from tests.ops.shapes import SPAN_FORMATS, SPANS, TINY_SPAN_FORMATS, TINY_SPANS
from tests.ops.test_write import assert_same_bytes, hostile
from vllm_sparq.ops.write.reference import write as reference

IMPLEMENTATIONS = has("quest_decode")
"""Bounds are made where they are read."""

KERNELS = [implementation for implementation in IMPLEMENTATIONS if implementation != "reference"]


def assert_bounds(world: World, tokens: Tokens) -> None:
    """Of every full block, against numpy over the tokens themselves; exactly, but for the sign of zero."""
    n = world.case.block_size
    for b, (key, s) in enumerate(zip(tokens.key, world.case.lens, strict=True)):
        finite = np.where(np.isfinite(key.double().numpy()), key.double().numpy(), 0.0)  # [S, G, D]
        for block in range(s // n):
            got = world.pages.ranking[int(world.block_table[b, block])].cpu().double().numpy()  # [G, N/16, 2, D]
            for span in range(n // 16):
                its = finite[block * n + span * 16 :][:16]
                np.testing.assert_array_equal(got[:, span, 0], its.min(0))
                np.testing.assert_array_equal(got[:, span, 1], its.max(0))


@pytest.mark.parametrize(
    ("implementation", "case"),
    each((*SPANS, *SPAN_FORMATS), tiny=(*TINY_SPANS, *TINY_SPAN_FORMATS), implementations=IMPLEMENTATIONS),
)
def test_bounds_are_the_extremes_of_the_tokens(implementation: str, case: Case) -> None:
    """In one step, and in steps that end inside spans and blocks."""
    run, tokens, on = load("write", implementation), case.tokens(), device(implementation)
    for cuts in ([], [7, 49, 64]):
        assert_bounds(write_in_chunks(case, tokens, run, cuts, on), tokens)


HOSTILE = tuple(
    replace(SPANS[0], lens=(16, 40), new=(16, 40), dtype=dtype, heads=2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_bounds_of_hostile_channels(implementation: str, case: Case) -> None:
    run, tokens = load("write", implementation), hostile(case)
    world = build(case, tokens, written="context", device=device(implementation))
    world.write(run)
    assert_bounds(world, tokens)


def prefilled(case: Case) -> Case:
    """The same batch with a prompt as its step: all of the first request, the last tokens of the others."""
    return replace(case, new=tuple(s if b == 0 else min(s, b * 7) for b, s in enumerate(case.lens)))


SAME = tuple(map(prefilled, SPANS))


@pytest.mark.parametrize(
    ("implementation", "case"), each(SAME, tiny=map(prefilled, TINY_SPANS), implementations=KERNELS)
)
def test_write_leaves_the_same_bytes_as_the_reference(implementation: str, case: Case) -> None:
    run, tokens = load("write", implementation), case.tokens()
    got = build(case, tokens, written="context", device=device(implementation))
    want = build(case, tokens, written="context")
    got.write(run)
    want.write(reference)
    assert_same_bytes(got, want, tokens)
