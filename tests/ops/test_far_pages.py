"""Pages whose addresses need 64 bits: 2.2 GB apart, of which little is ever touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.cases import ALL, Case, World, build, int32, load
from tests.ops.cases import device_of as device
from tests.ops.test_evict import run_evict, with_scores
from vllm_sparq.layout import Pages
from vllm_sparq.reads import SpansRead, SparqRead

APART = 22 * 10**8  # bytes, a multiple of 64


def pages_of(world: World) -> torch.Tensor:
    """The request's, in its order [M, G, bytes]."""
    blocks = world.block_table[0].long()
    return world.pages.data[blocks[blocks < len(world.pages.data)]]


def far(world: World) -> World:
    """The same, with pages that lie far apart, the last one first."""
    own, n_bytes = pages_of(world), world.case.layout.page_bytes
    n, n_heads = own.shape[:2]
    buffer = torch.empty((n - 1) * APART + n_heads * n_bytes, dtype=torch.uint8, device=own.device)
    pages, table = buffer.as_strided((n, n_heads, n_bytes), (APART, n_bytes, 1)), world.block_table.clone()
    table[0, :n] = int32(range(n - 1, -1, -1))
    for i, page in enumerate(own):
        pages[n - 1 - i] = page
    return replace(world, pages=Pages(pages, world.case.layout), block_table=table)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("fmt", ["model", "int8", "kivi4"])
def test_tokens_are_written_and_read(implementation: str, fmt: str) -> None:
    group = 16 if fmt == "kivi4" else None
    case, on = Case(lens=(20,), new=(20,), ranking="model", format=fmt, group_size=group), device(implementation)
    tokens = case.tokens()
    near = build(case, tokens, written="context", device=on)
    near, there = (replace(world, query=near.query[19:20]) for world in (near, far(near)))
    for world in (near, there):
        world.write(load("write", implementation))
    for op, options in [
        ("dense_decode", {}),
        ("sparq_decode", {"read": SparqRead(r=16, min_k=8, alpha_floor=0.0)}),
    ]:
        run = load(op, implementation)
        assert there.decode(run, **options).equal(near.decode(run, **options))
    last = replace(tokens, query=[tokens.query[0][19:]])
    context = build(replace(case, new=(1,)), last, written="context", device=on)
    run = load("prefill", implementation)
    got = replace(context, pages=there.pages, block_table=there.block_table).prefill(run)
    assert got.equal(context.prefill(run))


@pytest.mark.parametrize("implementation", ALL)
def test_spans_are_read(implementation: str) -> None:
    world = build(Case(lens=(57,), ranking="bounds", value_sum=False), device=device(implementation))
    run, read = load("quest_decode", implementation), SpansRead(min_k=32, dense_below=0)
    assert far(world).decode(run, read=read).equal(world.decode(run, read=read))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("fmt", ["model", "int4"])
def test_tokens_are_evicted(implementation: str, fmt: str) -> None:
    """Moved, or a whole block at a time."""
    case = Case(lens=(40,), positions=True, attention=True, format=fmt)
    near = with_scores(case, on=device(implementation))
    there, before = far(near), pages_of(near)
    for world in (near, there):
        run_evict(world, load("evict", implementation), [16], sinks=1, recent=3)
    assert pages_of(there).equal(pages_of(near))
    assert not pages_of(near).equal(before)
