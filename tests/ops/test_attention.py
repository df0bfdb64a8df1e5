"""The attention that each token gets, tracked by the ops that pay it, against plain softmax maps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, KERNELS, Case, World, build, each, load
from tests.ops.cases import device_of as device
from tests.ops.rounding import rounded_dense_decode
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from tests.ops.test_evict import slots_of
from vllm_sparq.ops.dense_decode.reference import dense_decode
from vllm_sparq.ops.prefill.reference import prefill
from vllm_sparq.ops.sparq_decode.reference import sparq_decode
from vllm_sparq.reads import SparqRead

BEFORE = 0.25
"""Score of every token before the step, so that adding and overwriting differ."""

TOLERANCE = {
    # fp32 logits and sums on both sides: 1e-6 of a weight each, up to 100 rows.
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    # K and q are exact in their type and logits are fp32 sums, but a kernel's exponential may be good to 2^-11 only.
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-10, "atol": 1e-5},
}


def scored(case: Case) -> Case:
    return replace(case, attention=True, positions=True)


def with_scores(case: Case, on: str, written: str = "all") -> World:
    world = build(case, device=on, written=written)
    world.pages.attention[:] = BEFORE
    return world


def scores_of(world: World) -> list[torch.Tensor]:
    """Per request, [S, G]."""
    return [
        world.pages.attention[page, :, place].cpu()
        for page, place in (slots_of(world, b, n) for b, n in enumerate(world.case.lens))
    ]


def assert_close(got: World, want: World, tolerance: dict[str, float]) -> None:
    for a, z in zip(scores_of(got), scores_of(want), strict=True):
        torch.testing.assert_close(a, z, **tolerance)


def assert_paid(world: World, n_rows: Iterable[int]) -> None:
    """Over the tokens of each request, one for each of its rows, however logits are rounded (sinks take a part)."""
    assert not world.case.sinks
    for scores, n in zip(scores_of(world), n_rows, strict=True):
        paid = torch.full((world.case.kv_heads,), float(n))
        torch.testing.assert_close((scores - BEFORE).sum(0), paid, rtol=1e-4, atol=1e-4)


LONG = Case(heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(900, 3, 0, 513))
LONG_CODES = [replace(LONG, format=name, ranking=None, value_sum=False) for name in ("int4", "kivi4")]
DECODES = [scored(case) for case in (*SHAPES[::2], LONG, *FORMATS[::2], *LONG_CODES)]
FEW = [scored(case) for case in (*TINY[:3], *TINY_FORMATS[::2])]


@pytest.mark.parametrize(("implementation", "case"), each(DECODES, tiny=FEW, implementations=KERNELS))
def test_dense_decode_notes_probabilities(implementation: str, case: Case) -> None:
    got, want = with_scores(case, device(implementation)), with_scores(case, "cpu")
    got.decode(load("dense_decode", implementation))
    rounded = implementation == "triton" and case.format != "model"
    want.decode(rounded_dense_decode if rounded else dense_decode)
    assert_close(got, want, TOLERANCE[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
def test_probabilities_add_up_to_one(implementation: str) -> None:
    """Over the tokens of a request, for each query row, whatever the op."""
    case = scored(Case(lens=(70, 33, 1), block_size=32))
    read = SparqRead(r=16, min_k=8, dense_below=0)
    for op, options in (("dense_decode", {}), ("sparq_decode", {"read": read})):
        world = with_scores(case, device(implementation))
        world.decode(load(op, implementation), **options)
        assert_paid(world, case.n_new)
    case = replace(case, new=(70, 20, 1))
    world = with_scores(case, device(implementation))
    world.prefill(load("prefill", implementation))
    assert_paid(world, case.new)


READS = (
    SparqRead(r=16, min_k=8, dense_below=0),
    SparqRead(r=16, min_k=8, dense_below=0, alpha_floor=0.0),
    SparqRead(r=16, min_k=8, dense_below=0, group_reduce="probs"),
    SparqRead(r=16, min_k=8, dense_below=40),
    SparqRead(r=16, min_k=20, dense_below=0, mass=0.3),
)
SPARSE = [
    scored(case)
    for case in (
        Case(lens=(1, 33, 100, 0, 47)),
        Case(heads=8, kv_heads=1, head_size=128, block_size=128, ranking="int8", lens=(900, 260)),
        Case(heads=2, kv_heads=2, block_size=32, format="int4", lens=(40, 97)),
        Case(heads=4, kv_heads=2, block_size=32, format="kivi4", ranking=None, lens=(40, 97)),
        # Weights of these types are whole numbers or bf16.
        Case(heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(900, 260)),
        Case(block_size=32, dtype=torch.float16, lens=(40, 97)),
        Case(block_size=32, dtype=torch.bfloat16, ranking="int8", lens=(40, 97)),
        Case(heads=2, kv_heads=2, block_size=32, dtype=torch.bfloat16, format="int4", lens=(40, 97)),
        Case(block_size=32, dtype=torch.float16, format="kivi4", ranking=None, lens=(40, 97)),
    )
]


ROUNDED_WEIGHTS = {"rtol": 0.0, "atol": 2**-8}
"""Weights that are bf16, of which a logit is a sum, are off by up to 2^-9 of themselves; whole numbers move it less."""


@pytest.mark.parametrize("read", READS, ids=["logits", "mean", "probs", "dense-below", "mass"])
@pytest.mark.parametrize(("implementation", "case"), each(SPARSE, tiny=SPARSE[:6:5], implementations=KERNELS))
def test_sparq_decode_notes_approximate_probabilities(implementation: str, case: Case, read: SparqRead) -> None:
    if read.alpha_floor < 1 and not case.layout.value_sum:
        case = replace(case, value_sum=True)
    got, want = with_scores(case, device(implementation)), with_scores(case, "cpu")
    got.decode(load("sparq_decode", implementation), read=read)
    want.decode(sparq_decode, read=read)
    assert_close(got, want, TOLERANCE[torch.float32] if case.dtype == torch.float32 else ROUNDED_WEIGHTS)
    assert_paid(got, case.n_new)


def of_rounded_codes(case: Case) -> dict[str, float]:
    """Codes may be rounded to the model's type before the product (`tolerances.OUT`): 2^-9 of logits up to 20."""
    return {"rtol": 1e-4, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 0.08, "atol": 1e-3}


def lens_and_new(case: Case) -> Case:
    """Prompts in chunks: from nothing, from inside a block, a single row."""
    lens = tuple(s + 2 * case.block_size + 5 for s in case.lens)
    new = tuple((s, s // 2, 1)[i % 3] for i, s in enumerate(lens))
    return replace(scored(case), lens=lens, new=new)


PREFILLS = [lens_and_new(case) for case in (*SHAPES[::2], LONG, *FORMATS[::3])]
FEW_PREFILLS = [lens_and_new(case) for case in (*TINY[:2], *TINY_FORMATS[::3])]


@pytest.mark.parametrize(("implementation", "case"), each(PREFILLS, tiny=FEW_PREFILLS, implementations=KERNELS))
def test_prefill_notes_the_sum_over_rows(implementation: str, case: Case) -> None:
    got, want = with_scores(case, device(implementation)), with_scores(case, "cpu")
    got.prefill(load("prefill", implementation))
    want.prefill(prefill)
    assert_close(got, want, TOLERANCE[case.dtype] if case.format == "model" else of_rounded_codes(case))
    if not case.sinks:
        assert_paid(got, case.n_new)


PIECES = [
    scored(replace(Case(ranking=None, value_sum=False, heads=2, kv_heads=1), format=name, block_size=n, **other))
    for name, n, other in (
        ("int4", 32, dict(lens=(150, 40, 64), heads=4, kv_heads=2)),
        ("int4", 16, dict(lens=(75, 20), dtype=torch.bfloat16)),
        ("kivi4", 32, dict(lens=(100, 64))),
        ("kivi2", 96, dict(lens=(200, 96), dtype=torch.bfloat16)),
    )
]
"""Prompts whose tokens see the blocks before their own as codes, each block a row of its own in the prefill call."""


def prefill_in_pieces(world: World, implementation: str, n_begun: int) -> None:
    """All tokens of the world's requests but the first ``n_begun``, which lie in the first block."""
    n, tables, contexts, starts, key_starts, rows, keys = world.case.block_size, [], [], [0], [0], [], []
    tokens = world.case.tokens()
    for b, length in enumerate(world.case.lens):
        for block in range(-(-length // n)):
            first, stop = block * n, min(length, (block + 1) * n)
            begun = n_begun if block == 0 else 0
            tables.append(world.block_table[b])
            contexts.append(first)
            rows.append(tokens.query[b][first + begun : stop])
            keys.append(torch.stack([tokens.key[b], tokens.value[b]])[:, first:stop])
            starts.append(starts[-1] + stop - first - begun)
            key_starts.append(key_starts[-1] + stop - first)
    query, new, on = torch.cat(rows), torch.cat(keys, 1), world.buffer.device
    load("prefill", implementation)(
        *(query.to(on), *new.to(on), world.pages, torch.stack(tables)),
        *(torch.tensor(numbers, dtype=torch.int32, device=on) for numbers in (starts, contexts)),
        scale=world.case.scale,
        out=torch.empty_like(query).to(on),
        key_start_loc=torch.tensor(key_starts, dtype=torch.int32, device=on),
    )


@pytest.mark.parametrize("n_begun", [0, 5])
@pytest.mark.parametrize(("implementation", "case"), each(PIECES, implementations=KERNELS))
def test_pieces_of_a_prompt_are_added_up(implementation: str, case: Case, n_begun: int) -> None:
    case = replace(case, new=case.lens)
    got, want = with_scores(case, device(implementation)), with_scores(case, "cpu")
    prefill_in_pieces(got, implementation, n_begun)
    prefill_in_pieces(want, "reference", n_begun)
    assert_close(got, want, of_rounded_codes(case))
    assert_paid(got, (length - n_begun for length in case.lens))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="who stores where is noted by the interpreter, and with a GPU kernels are compiled",
)
@pytest.mark.parametrize("case", PIECES, ids=str)
def test_a_score_is_written_by_one_program(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of a GPU run at once: what two of them load, add to and store, one of them loses."""
    load("prefill", "triton")
    from tests.ops.stores import shared_addresses
    from vllm_sparq.ops.triton_common import launch

    launch.n_multiprocessors.cache_clear()
    monkeypatch.setattr(launch, "INTERPRETED_SMS", 16)  # several programs for each row
    world = with_scores(replace(case, new=case.lens), "cpu")
    lo = world.buffer.data_ptr()
    with shared_addresses(lo, lo + world.buffer.nbytes) as shared:
        prefill_in_pieces(world, "triton", 5)
    assert not shared


LOCAL = Case(heads=2, kv_heads=1, ranking="model", lens=(64,), value_sum=False, positions=True)
EVICTED = (
    *(LOCAL, scored(LOCAL)),
    replace(LOCAL, ranking="int4", block_size=32, dtype=torch.bfloat16),
    replace(LOCAL, ranking="int8", dtype=torch.float16),
    replace(LOCAL, ranking="int4"),
)
"""Pages that were evicted from by age, which add nothing up, and by attention."""


@pytest.mark.parametrize(("implementation", "case"), each(EVICTED))
@pytest.mark.parametrize("limit", [dict(min_k=7), dict(min_k=20, mass=1e-9)], ids=["k", "mass"])
def test_newest_tokens_are_found_by_position(implementation: str, case: Case, limit: dict[str, Any]) -> None:
    """After an eviction the newest tokens may lie in any slot: a read of local tokens alone must find them."""
    read = SparqRead(r=1, local=7, dense_below=0, **limit)
    world = build(case, device=device(implementation))
    if case.attention:
        world.pages.attention[:] = BEFORE
    generator = torch.Generator().manual_seed(3)
    page, place = slots_of(world, 0, 64)
    order = torch.cat([torch.randperm(63, generator=generator), torch.tensor([63])]).int().to(world.buffer.device)
    world.pages.positions[page, 0, place] = order
    got = world.decode(load("sparq_decode", implementation), read=read)
    newest = (order >= 56).nonzero()[:, 0]
    keys, values = world.pages.keys[page, 0, place][newest].float(), world.pages.values[page, 0, place][newest].float()
    weights = torch.softmax(case.scale * world.query[0].float() @ keys.T, -1)
    torch.testing.assert_close(got[0].float(), weights @ values, **tolerances.OUT[case.dtype])
