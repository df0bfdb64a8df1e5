"""`restore`: what codes stand for, where it is asked to be, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.cases import HUGE_BYTE, NAN_BYTE, Case, World, build
from tests.ops.cases import device_of as device
from tests.ops.shapes import FORMATS, TINY_FORMATS
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.prefill.reference import context_tokens
from vllm_sparq.ops.restore import restore

CASES = {
    replace(case, lens=(case.block_size * 3 + 5, 7, case.block_size, 0), new=()) for case in (*FORMATS, *TINY_FORMATS)
}


def restored(world: World, implementation: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """K and V [P', N, G, D], NaN where nothing was restored, and the first page of each request."""
    case, on = world.case, world.pages.data.device
    n_blocks = torch.tensor([s // case.block_size for s in case.lens], dtype=torch.int32, device=on)
    first = [5, 1, 2, 0]
    shape = 9, case.kv_heads, case.block_size, case.head_size
    keys, values = torch.full((2, *shape), torch.nan, dtype=case.dtype, device=on).transpose(2, 3)
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from vllm_sparq.ops.restore.triton import restore as run
    else:
        from vllm_sparq.ops.restore.reference import restore as run
    first_pages = torch.tensor(first, dtype=torch.int32, device=on)
    run(world.pages, world.block_table, n_blocks, first_pages, most_blocks=3, keys=keys, values=values)
    return keys.cpu(), values.cpu(), first


@pytest.mark.parametrize(
    ("case", "poison"),
    [(case, (NAN_BYTE, HUGE_BYTE)[i % 2]) for i, case in enumerate(sorted(CASES, key=str))],
    ids=[str(case) for case in sorted(CASES, key=str)],
)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_blocks_are_what_prompts_see_of_them(implementation: str, case: Case, poison: int) -> None:
    world = build(case, poison=poison, device=device(implementation))
    *got, first = restored(world, implementation)
    own, here = torch.zeros(len(got[0]), dtype=torch.bool), build(case, poison=poison)
    for b, length in enumerate(case.lens):
        n = length // case.block_size
        own[first[b] : first[b] + n] = True
        for head in range(case.kv_heads):
            seen = context_tokens(here.pages, here.block_table[b], n * case.block_size, head)
            for name, there, tokens in zip("KV", got, seen, strict=True):
                found = there[first[b] : first[b] + n, :, head].flatten(0, 1)
                message = f"{name} of request {b}, head {head}"
                torch.testing.assert_close(found, tokens.to(case.dtype), rtol=0, atol=0, msg=message)
    assert all(part[~own].isnan().all() for part in got)


def test_arguments_are_checked() -> None:
    layout = PageLayout(head_size=64, block_size=32, dtype=torch.bfloat16, format="int4")
    pages, table, one = Pages.empty(2, 1, layout), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1).int()
    room = torch.empty(2, 3, 32, 1, 64, dtype=torch.bfloat16)
    restore(pages, table, one, one, most_blocks=2, keys=room[0], values=room[1])
    with pytest.raises(ValueError, match=r"most_blocks must be in 0 .. 2"):
        restore(pages, table, one, one, most_blocks=3, keys=room[0], values=room[1])
    with pytest.raises(ValueError, match=r"values must be torch.bfloat16 \[P', 32, 1, 64\].* torch.float32"):
        restore(pages, table, one, one, most_blocks=2, keys=room[0], values=room[1].float())
    plain = Pages.empty(2, 1, replace(layout, format="model"))
    with pytest.raises(ValueError, match=r"pages must be quantized, got format 'model'"):
        restore(plain, table, one, one, most_blocks=2, keys=room[0], values=room[1])
