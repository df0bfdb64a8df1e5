"""`dense_decode`: against the reference, by hand, and what must not change its result."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, HUGE_BYTE, KERNELS, Case, Tokens, build, each, load
from tests.ops.cases import device_of as device
from tests.ops.rounding import rounded_dense_decode
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from vllm_sparq.formats import QUANTIZED as QUANTIZED_FORMATS
from vllm_sparq.ops.dense_decode.reference import dense_decode as reference

LONG = (
    Case(heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(900, 3, 0, 513)),
    Case(lens=(0, 600, 1), dtype=torch.float32, head_size=80, ranking=None, value_sum=False),
    Case(lens=(700,), dtype=torch.float16, block_size=64, kv_heads=4, ranking=None),
)
SPLIT = Case(heads=2, kv_heads=1, head_size=256, block_size=128, lens=(600,))
"""Long enough for every implementation to cut it."""

CASES, FEW = (*SHAPES, *LONG), (*TINY, SPLIT)


@pytest.mark.parametrize(("implementation", "case"), each(CASES, tiny=FEW, implementations=KERNELS))
def test_dense_decode_is_the_reference(implementation: str, case: Case) -> None:
    world = build(case, device=device(implementation))
    got = world.decode(load("dense_decode", implementation))
    want = build(case).decode(reference)
    torch.testing.assert_close(got.cpu(), want, **tolerances.OUT[case.dtype])


LONG_FORMATS = tuple(
    replace(LONG[0], format=fmt, ranking=None, value_sum=False, lens=(900, 3, 0, 513, 512)) for fmt in QUANTIZED_FORMATS
)
QUANTIZED = KERNELS
"""Implementations that read quantized pages."""
TINY_QUANTIZED = (*TINY_FORMATS, replace(SPLIT, format="kivi4", ranking=None, value_sum=False))


@pytest.mark.parametrize(
    ("implementation", "case"), each((*FORMATS, *LONG_FORMATS), tiny=TINY_QUANTIZED, implementations=QUANTIZED)
)
def test_quantized_pages_are_read(implementation: str, case: Case) -> None:
    """Triton kernels multiply what codes stand for in the model's type, rounded once: see `tolerances.OUT`."""
    world = build(case, device=device(implementation))
    got = world.decode(load("dense_decode", implementation))
    want = build(case).decode(rounded_dense_decode if implementation == "triton" else reference)
    torch.testing.assert_close(got.cpu(), want, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("format", ["model", "int8", "int4", "kivi4", "kivi2"])
@pytest.mark.parametrize("group", [5, 6, 7, 8, 9, 16])
def test_query_groups_of_any_size(format: str, group: int) -> None:
    """The C++ kernels take a few heads at a time, evenly: every remainder there is."""
    case = Case(
        heads=2 * group, kv_heads=2, block_size=64, dtype=torch.bfloat16, format=format, ranking=None, lens=(203, 64)
    )
    got, want = build(case).decode(load("dense_decode", "cpu")), build(case).decode(reference)
    torch.testing.assert_close(got, want, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize(
    ("implementation", "case"),
    each(LONG_FORMATS, tiny=[case for case in LONG_FORMATS if case.format == "kivi4"], implementations=QUANTIZED),
)
def test_broken_groups_read_as_nan(implementation: str, case: Case) -> None:
    """A group of V that is NaN shows in its channels alone; one of K shows in the whole head."""
    tokens, on = case.tokens(), device(implementation)
    tokens.value[0][5, 0, 7] = torch.inf
    tokens.key[3][9, 1, 3] = torch.nan
    got = build(case, tokens, device=on).decode(load("dense_decode", implementation)).cpu()
    want = build(case, tokens).decode(rounded_dense_decode if implementation == "triton" else reference)
    assert want[0, 0].isnan().sum() == case.layout.group("value")
    assert want[3, -1].isnan().all()
    assert want[:, 4:][:3].isfinite().all()
    torch.testing.assert_close(got, want, equal_nan=True, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize(
    ("implementation", "case"), each(LONG_FORMATS, tiny=TINY_FORMATS[1:4], implementations=QUANTIZED)
)
def test_nothing_but_the_tokens_of_quantized_pages_matters(implementation: str, case: Case) -> None:
    """Other page ids, other garbage: the same bits."""
    run, on = load("dense_decode", implementation), device(implementation)
    plain = build(case, device=on).decode(run)
    assert plain.isfinite().all()
    assert build(case, poison=HUGE_BYTE, device=on).decode(run).equal(plain)
    assert build(case, shuffle=1, device=on).decode(run).equal(plain)


@pytest.mark.parametrize("implementation", ALL)
def test_dense_decode_by_hand(implementation: str) -> None:
    # D = 16, scale 1/4. q = 4 in channel 0, so the logit of a token is its K in channel 0: ln 1, ln 2, ln 5 over three
    # tokens, weights 1/8, 2/8, 5/8. V is 8, 16, 24: (8 + 32 + 120) / 8 = 20.
    # The second head has q = 0: the plain mean, 16.
    case = Case(heads=2, kv_heads=1, head_size=16, lens=(3,), ranking=None, value_sum=False)
    query, key = torch.zeros(1, 2, 16), torch.zeros(3, 1, 16)
    query[0, 0, 0] = 4
    key[:, 0, 0] = torch.tensor([1.0, 2.0, 5.0]).log()
    value = torch.tensor([8.0, 16.0, 24.0])[:, None, None].repeat(1, 1, 16)
    world = build(case, Tokens([query], [key], [value]), device=device(implementation))
    out = world.decode(load("dense_decode", implementation)).cpu()
    torch.testing.assert_close(out[0], torch.tensor([20.0, 16.0])[:, None].repeat(1, 16))


@pytest.mark.parametrize("implementation", ALL)
def test_large_logits_do_not_overflow(implementation: str) -> None:
    case = Case(lens=(20, 33), dtype=torch.bfloat16)
    tokens = case.tokens()
    tokens.query = [100 * q for q in tokens.query]
    tokens.key = [100 * k for k in tokens.key]
    world = build(case, tokens, device=device(implementation))
    out = world.decode(load("dense_decode", implementation)).cpu()
    # Logits differ by thousands: the output is the value of the best key.
    for b, (query, key, value) in enumerate(zip(tokens.query, tokens.key, tokens.value, strict=True)):
        for h in range(case.heads):
            logits = key[:, h // 2].double() @ query[0, h].double()
            top = logits.topk(2)
            assert (top.values[0] - top.values[1]) * case.scale > 100
            torch.testing.assert_close(out[b, h], value[top.indices[0], h // 2], **tolerances.OUT[case.dtype])


@pytest.mark.parametrize(("implementation", "case"), each([TINY[0], replace(TINY[1], lens=(0, 18, 0))]))
def test_nothing_but_the_tokens_matters(implementation: str, case: Case) -> None:
    """Other page ids, other garbage: the same bits. Padding rows are zero, and the gap between rows keeps its NaN."""
    run, on = load("dense_decode", implementation), device(implementation)
    plain = build(case, device=on).decode(run)
    assert plain.isfinite().all()
    assert build(case, poison=HUGE_BYTE, device=on).decode(run).equal(plain)
    assert build(case, shuffle=1, device=on).decode(run).equal(plain)
    for b, s in enumerate(case.lens):
        assert s > 0 or not plain[b].any()
    assert plain._base is not None
    assert plain._base[:, case.heads].isnan().all()


@pytest.mark.parametrize("implementation", ALL)
def test_a_batch_of_one_is_a_row_of_the_batch(implementation: str) -> None:
    case = replace(TINY[0], lens=(33, 17, 1))
    tokens, run, on = case.tokens(), load("dense_decode", implementation), device(implementation)
    together = build(case, tokens, device=on).decode(run)
    for b, s in enumerate(case.lens):
        row = Tokens(tokens.query[b : b + 1], tokens.key[b : b + 1], tokens.value[b : b + 1])
        alone = build(replace(case, lens=(s,)), row, device=on).decode(run)
        torch.testing.assert_close(alone[0], together[b], **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("group", [3, 4, 8])
def test_a_group_of_equal_heads_is_one_head(implementation: str, group: int) -> None:
    case = Case(heads=group, kv_heads=1, lens=(17, 33), dtype=torch.float32)
    tokens, run, on = case.tokens(), load("dense_decode", implementation), device(implementation)
    alone = Tokens([q[:, :1] for q in tokens.query], tokens.key, tokens.value)
    tokens.query = [q[:, :1].repeat(1, group, 1) for q in tokens.query]
    grouped = build(case, tokens, device=on).decode(run)
    single = build(replace(case, heads=1), alone, device=on).decode(run)
    torch.testing.assert_close(grouped, single.expand_as(grouped), **tolerances.OUT[case.dtype])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_few_tasks_end_no_threads() -> None:
    """libgomp ends those that a smaller team leaves out, and the next full one starts them anew: at every layer."""
    run = load("dense_decode", "cpu").__wrapped__  # type: ignore[attr-defined]
    world, many = build(Case(heads=1, kv_heads=1, lens=(20, 20, 20))), 4

    def threads() -> set[str]:
        torch.exp(torch.zeros(1 << 20))  # takes all of them
        return set(os.listdir("/proc/self/task"))

    before = torch.get_num_threads()
    torch.set_num_threads(many)
    try:
        alive = threads()
        for _ in range(3):
            world.decode(run)
            assert threads() == alive
    finally:
        torch.set_num_threads(before)
