"""First slots seen by queries of their own: the batched version against the specification, and that against others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import THREADS, threaded
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.reference import dense_decode
from vllm_sparq.ops.dispatch import OVERRIDE
from vllm_sparq.ops.prefill.reference import prefill
from vllm_sparq.ops.turned_attention import cpu, implementation, reference, turned_attention
from vllm_sparq.ops.write.reference import write

LENS, NEW = (3, 0, 40, 33, 16), (3, 0, 1, 20, 16)
"""Slots of each request, and how many of them are rows."""
DECODES = (3, 1, 48, 17, 33, 300, 16), (1, 1, 1, 1, 20, 1, 16)
"""The same where four requests decode before the first that does not."""
SINKS = torch.tensor([0.5, -3.0, 4.0, 20.0])


def world(
    dtype: torch.dtype = torch.float32,
    n_turned: int = 4,
    *,
    step: Any = (LENS, NEW),
    heads: tuple[int, int, int] = (4, 2, 64),
) -> dict[str, Any]:
    """Arguments of the op; ``heads`` are H, G and D."""
    (lens_of, new), (n_heads, n_kv_heads, d) = step, heads
    blocks = -(-max(lens_of) // 16)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layout = PageLayout(head_size=d, block_size=16, dtype=dtype, positions=True)
    pages = Pages.empty(len(lens_of) * blocks + 5, n_kv_heads, layout)
    pages.data.fill_(0xFF)  # NaN
    ids = torch.randperm(len(pages.data), generator=generator)
    table = ids[: len(lens_of) * blocks].view(len(lens_of), blocks).int()
    starts = torch.tensor([0, *new]).cumsum(0).int()
    lens = torch.tensor(lens_of).int()
    all_starts = torch.tensor([0, *lens_of]).cumsum(0).int()
    key, value = (randn(sum(lens_of), n_kv_heads, d).to(dtype) for _ in range(2))
    write(key, value, pages, table, all_starts, lens)
    query, turned = randn(sum(new), n_heads, d).to(dtype), randn(sum(new), n_turned, n_heads, d)
    return dict(query=query, turned=turned, pages=pages, block_table=table, query_start_loc=starts, seq_lens=lens)


def run(function: Any, given: dict[str, Any], **softmax: Any) -> torch.Tensor:
    out = torch.zeros_like(given["query"])
    function(**given, scale=0.125, out=out, **softmax)
    return out


@pytest.mark.parametrize(
    "softmax", [{}, {"sinks": SINKS}, {"soft_cap": 2.0}, {"sinks": SINKS, "soft_cap": 2.0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_turned", [1, 4, 20])
@pytest.mark.parametrize("step", [(LENS, NEW), DECODES], ids=["prompts first", "decodes first"])
def test_it_is_the_reference(step: Any, n_turned: int, dtype: torch.dtype, softmax: dict[str, Any]) -> None:
    given = world(dtype, n_turned, step=step)
    want = run(reference.turned_attention, given, **softmax)
    found = run(threaded(cpu.turned_attention, THREADS), given, **softmax)
    torch.testing.assert_close(found, want, **tolerances.OUT[dtype])
    assert bool(want.isfinite().all())


@pytest.mark.parametrize("heads", [(1, 1, 80), (8, 1, 128), (5, 1, 256), (6, 3, 112)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Groups of one, of few and of many, and sizes that are no power of two."""
    given = world(dtype, step=DECODES, heads=heads)
    want = run(reference.turned_attention, given)
    found = run(threaded(cpu.turned_attention, THREADS), given)
    torch.testing.assert_close(found, want, **tolerances.OUT[dtype])


def test_one_long_context_is_cut_among_threads() -> None:
    """Parts whose first slots are not those of the request, and one that begins among them."""
    given = world(torch.bfloat16, 20, step=((900,), (1,)))
    want = run(reference.turned_attention, given)
    found = run(threaded(cpu.turned_attention, THREADS), given)
    torch.testing.assert_close(found, want, **tolerances.OUT[torch.bfloat16])


@pytest.mark.parametrize("softmax", [{}, {"sinks": SINKS, "soft_cap": 2.0}], ids=["plain", "sinks and cap"])
def test_queries_that_are_not_turned_see_what_they_see(softmax: dict[str, Any]) -> None:
    given = world()
    same = given | {"turned": given["query"][:, None].expand(-1, 4, -1, -1)}
    found = run(turned_attention, same, **softmax)
    starts, pages, table = given["query_start_loc"], given["pages"], given["block_table"]
    for b in (2, 3):
        rows, single = slice(int(starts[b]), int(starts[b + 1])), (table[b : b + 1], given["seq_lens"][b : b + 1])
        alone = torch.zeros_like(found[rows])
        dense_decode(given["query"][rows][-1:], pages, *single, scale=0.125, out=alone[-1:], **softmax)
        torch.testing.assert_close(found[rows][-1], alone[-1])
    rows = slice(int(starts[4]), int(starts[5]))  # a prompt that begins here
    keys, values = (x[int(table[4, 0])].transpose(0, 1) for x in (pages.keys, pages.values))
    of_prompt = torch.zeros_like(found[rows])
    none = torch.tensor([0, 16]).int(), torch.tensor([0]).int()
    prefill(given["query"][rows], keys, values, pages, table[4:], *none, scale=0.125, out=of_prompt, **softmax)
    torch.testing.assert_close(found[rows], of_prompt)


def test_a_turned_query_is_what_sees_its_slot() -> None:
    """By hand: two tokens of one head, the first of which is seen by another query."""
    layout = PageLayout(head_size=32, block_size=16, dtype=torch.float32)
    pages = Pages.empty(1, 1, layout)
    key = torch.zeros(2, 1, 32)
    key[0, 0, 0] = key[1, 0, 1] = 1.0
    value = torch.arange(2.0).view(2, 1, 1).expand(-1, -1, 32).contiguous()
    table, starts, lens = torch.zeros(1, 1).int(), torch.tensor([0, 2]).int(), torch.tensor([2]).int()
    write(key, value, pages, table, starts, lens)
    query, turned = torch.zeros(1, 1, 32), torch.zeros(1, 1, 1, 32)
    query[0, 0, :2], turned[0, 0, 0, 0] = torch.tensor([9.0, 1.0]), 2.0
    one = torch.tensor([0, 1]).int()
    for function in (reference.turned_attention, cpu.turned_attention):
        out = torch.zeros(1, 1, 32)
        function(query, turned, pages, table, one, lens, scale=1.0, out=out)
        assert float(out[0, 0, 0]) == pytest.approx(1 / (1 + torch.e))  # logits 2 and 1


def test_what_does_not_fit_is_refused() -> None:
    given = world()
    with pytest.raises(ValueError, match=r"turned must be float32 \[40, n, 4, 64\], got torch.bfloat16"):
        run(turned_attention, given | {"turned": given["turned"].bfloat16()})
    quantized = Pages.empty(20, 2, PageLayout(head_size=64, block_size=16, dtype=torch.float32, format="int8"))
    with pytest.raises(ValueError, match="pages must be in the model's type, got format 'int8'"):
        run(turned_attention, given | {"pages": quantized})
    adding = Pages.empty(
        20, 2, PageLayout(head_size=64, block_size=16, dtype=torch.float32, positions=True, attention=True)
    )
    with pytest.raises(ValueError, match="pages must not add up attention"):
        run(turned_attention, given | {"pages": adding})


@pytest.mark.parametrize("n_turned", [0, 4])
def test_any_strides_and_no_turned_slot_at_all(n_turned: int) -> None:
    given = world(step=DECODES, n_turned=n_turned)
    apart = torch.empty(*given["turned"].shape, 2)[..., 0].copy_(given["turned"])
    assert n_turned == 0 or not apart.is_contiguous()
    want = run(reference.turned_attention, given)
    torch.testing.assert_close(run(turned_attention, given | {"turned": apart}), want, **tolerances.OUT[torch.float32])


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    assert implementation() is cpu.turned_attention
    monkeypatch.setenv(OVERRIDE, "reference")
    assert implementation() is reference.turned_attention
