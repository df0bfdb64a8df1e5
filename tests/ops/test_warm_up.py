"""What is launched at start is all that steps launch: counted by the keys that Triton looks compiled code up with."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.ops.keys import keys, unaligned
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.triton import dense_decode
from vllm_sparq.ops.evict.triton import evict
from vllm_sparq.ops.prefill.triton import prefill
from vllm_sparq.ops.quest_decode.triton import quest_decode
from vllm_sparq.ops.restore.triton import restore
from vllm_sparq.ops.sparq_decode.triton import sparq_decode
from vllm_sparq.ops.warm_up import warm_decodes, warm_evictions, warm_prefills, warm_restores, warm_writes
from vllm_sparq.ops.write.triton import write
from vllm_sparq.reads import SpansRead, SparqRead

READ = SparqRead(r=16, min_k=128, k_per_token=Fraction(1, 16), dense_below=1024, alpha_floor=0.5)
SPANS = SpansRead(min_k=128, k_per_token=Fraction(1, 16), dense_below=1024)
TRACKED = dict(positions=True, attention=True)
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "sparq": (partial(sparq_decode, read=READ), dict(ranking="int4", value_sum=True), 1000),
    "sparq, short": (partial(sparq_decode, read=READ), dict(ranking="int4", value_sum=True), 17),
    "quest": (partial(quest_decode, read=SPANS), dict(ranking="bounds"), 300),
    "flexgen": (dense_decode, dict(format="int4"), 100),
    "kivi over h2o": (dense_decode, dict(format="kivi4", **TRACKED), 33),
    "float32": (dense_decode, dict(dtype=torch.float32), 1),
}
"""A decode op, parts of its pages, and the blocks of a request."""


@pytest.mark.parametrize("name", CASES)
def test_steps_launch_what_was_launched_at_start(name: str) -> None:
    decode, parts, width = CASES[name]
    heads, kv_heads, d = 32, 8, 128
    layout = PageLayout(head_size=d, block_size=128, **{"dtype": torch.bfloat16, **parts})
    pages = Pages.empty(1, kv_heads, layout)
    with keys() as found:
        warm_decodes(decode, pages, heads, width)
        warm_writes(write, pages, width)
        warm_prefills(prefill, pages, heads, width)
        if layout.quantized is not None:
            warm_restores(pages, width)
        if layout.positions:
            warm_evictions(evict, pages, width)
    warm = set(found)
    rng = random.Random(5)
    with keys() as found:
        for _ in range(60):
            step(rng, decode, pages, heads, width)
    assert len({kernel for kernel, _ in found}) >= 3
    assert not {kernel for kernel, _ in set(found) - warm}


def step(rng: random.Random, decode: Any, pages: Pages, heads: int, width: int) -> None:
    """Every op on a step of a random size, its tensors cut out of those of a larger one."""
    layout, kv_heads = pages.layout, pages.data.shape[1]
    b = rng.choice([1, 2, 3, 7, 8, 24, 65, 100, 256, 600])
    t = b * rng.choice([1, 3, 5, 40, 300 // b + 1, 4000 // b + 1])
    qkv = torch.empty(t, heads + 2 * kv_heads, layout.head_size, dtype=layout.dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
    table, lens = unaligned(torch.zeros(b, width, dtype=torch.int32)), unaligned(torch.zeros(b, dtype=torch.int32))
    starts = unaligned(torch.zeros(b + 1, dtype=torch.int32))
    out = torch.empty_like(query)
    decode(query[:b], pages, table, lens, scale=0.1, out=out[:b])
    write(key, value, pages, table, starts, lens, lens if layout.positions and rng.random() < 0.5 else None)
    ahead = starts if layout.quantized is not None and rng.random() < 0.5 else None
    prefill(query, key, value, pages, table, starts, lens, scale=0.1, out=out, key_start_loc=ahead)
    if layout.quantized is not None:
        n = rng.choice([1, 3, 40])
        room = torch.empty(2, 50 * kv_heads * layout.block_size * layout.head_size, dtype=layout.dtype)
        shape = n, kv_heads, layout.block_size, layout.head_size
        keys, values = (part[: n * room.shape[1] // 50].view(shape).transpose(1, 2) for part in room)
        restore(pages, table, lens, lens, most_blocks=min(n, width), keys=keys, values=values)
    if layout.positions:
        evict(pages, table, lens, lens, lens, sinks=rng.randrange(20), rank="attention" if layout.attention else "age")
