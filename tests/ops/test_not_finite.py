"""A request whose q or K is not finite answers nonsense, but it alone, and reads tokens of its own."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops.cases import KERNELS, Case, World, build, load
from tests.ops.cases import device_of as device
from vllm_sparq.reads import SpansRead, SparqRead

SPOTS = [
    *(("query", torch.nan), ("query", -torch.inf), ("key", torch.inf), ("value", torch.nan)),
    *(("newest key", torch.nan), ("newest key", -torch.inf)),
]
"""Where a number that is not finite lies: in each of as many requests, among them."""

CASE = Case(heads=2, kv_heads=1, lens=(60, *[80] * len(SPOTS), 50), block_size=32)
WHOLE = [0, len(SPOTS) + 1]
"""The requests without such a number."""

_COUNTS: dict[str, Any] = dict(r=16, min_k=40, local=4, dense_below=0)
READS: dict[str, tuple[str, SparqRead | SpansRead]] = {
    f"{reduce}{'-mass' if mass else ''}{'-mean' if floor < 1 else ''}": (
        "sparq_decode",
        SparqRead(group_reduce=reduce, mass=mass, alpha_floor=floor, **_COUNTS),
    )
    for reduce in ("logits", "probs")
    for mass in (None, 0.6)
    for floor in (1.0, 0.0)
} | {"spans": ("quest_decode", SpansRead(min_k=64, dense_below=0))}


def world_of(op: str, on: str, *, spoilt: bool) -> World:
    case = replace(CASE, ranking="bounds", value_sum=False) if op == "quest_decode" else CASE
    tokens = case.tokens()
    for b, (part, number) in enumerate(SPOTS if spoilt else (), start=1):
        of_part = {"query": tokens.query, "value": tokens.value}.get(part, tokens.key)
        # Heavy enough in q to be a channel that ranks, whatever the part.
        channel = int(tokens.query[b][0].abs().sum(0).argmax())
        of_part[b][{"query": 0, "newest key": -1}.get(part, 40), -1, channel] = number
    return build(case, tokens, device=on)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("implementation", KERNELS)
def test_only_its_request_suffers(implementation: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (op, read), on = READS[name], device(implementation)
    run = load(op, implementation)
    plain = world_of(op, on, spoilt=False).decode(run, read=read)
    world, listed = world_of(op, on, spoilt=True), []
    if implementation == "triton":
        module = importlib.import_module(f"vllm_sparq.ops.{op}.triton")
        attend = module.attend

        def noted(query: torch.Tensor, pages: Any, cells: torch.Tensor, *args: Any, **named: Any) -> Any:
            listed.append((cells.clone(), named.get("n_listed")))
            return attend(query, pages, cells, *args, **named)

        monkeypatch.setattr(module, "attend", noted)
        # What nobody writes is all the same then: no two tokens of one list may be.
        monkeypatch.setattr(torch, "empty", torch.zeros)
    out = world.decode(run, read=read)
    assert out[WHOLE].equal(plain[WHOLE])
    assert not out.isfinite().all()
    for cells, n_listed in listed:
        check_lists(world, read, cells.cpu(), n_listed)


def check_lists(world: World, read: SparqRead | SpansRead, cells: torch.Tensor, n_listed: torch.Tensor | None) -> None:
    """Each list holds as many tokens as are read, all different, all of its request."""
    n, n_kv = world.case.block_size, world.case.kv_heads
    for b, length in enumerate(world.case.lens):
        blocks = world.block_table[b].cpu()
        own = {int(blocks[t // n]) * n + t % n for t in range(length)}
        for row in range(b * n_kv, (b + 1) * n_kv):
            n_read = read.n_selected(length) if n_listed is None else int(n_listed[row])
            assert 0 < n_read <= read.n_selected(length)
            found = cells[row, :n_read].tolist()
            assert len(set(found)) == n_read
            assert set(found) <= own
