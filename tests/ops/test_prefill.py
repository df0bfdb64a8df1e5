"""`prefill`: against the reference, by hand, and what must not change its result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, HUGE_BYTE, KERNELS, Case, Tokens, build, each, load
from tests.ops.cases import device_of as device
from tests.ops.rounding import multiplied
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from vllm_sparq.formats import QUANTIZED as QUANTIZED_FORMATS
from vllm_sparq.ops.codec import decode_page
from vllm_sparq.ops.prefill.reference import prefill as reference


def chunks(case: Case) -> Case:
    """The same requests with steps of many sizes: a whole prompt, an odd chunk, one token, a block."""
    sizes = (10**9, 5, 1, case.block_size, 33)
    return replace(case, new=tuple(min(s, sizes[b % len(sizes)]) for b, s in enumerate(case.lens)))


CHUNKED = (
    *(chunks(case) for case in SHAPES),
    Case(lens=(1, 15, 16, 17, 33), new=(1, 15, 16, 17, 33), dtype=torch.bfloat16),
    Case(lens=(16, 32, 0, 48, 7), new=(0, 16, 0, 1, 0)),
    Case(lens=(300, 200), new=(150, 200), dtype=torch.bfloat16, head_size=128, block_size=128, heads=8),
    Case(lens=(40, 40), new=(24, 8), ranking=None, value_sum=False, dtype=torch.float16),
    Case(lens=(257,), new=(256,), dtype=torch.float32, block_size=64),
    Case(lens=(1300, 700), new=(2, 250), dtype=torch.bfloat16, block_size=64, heads=3, kv_heads=1),
    Case(lens=(800,), new=(400,), dtype=torch.float16, block_size=64, heads=1, kv_heads=1),
)
SPLIT = Case(lens=(2100,), new=(3,), block_size=256, heads=2, kv_heads=1)
"""So few rows and so long a context that every implementation cuts it."""

FEW = (*(chunks(case) for case in TINY), CHUNKED[len(SHAPES) + 1], SPLIT)


@pytest.mark.parametrize(("implementation", "case"), each(CHUNKED, tiny=FEW, implementations=KERNELS))
@pytest.mark.parametrize("written", ["context", "all"])
def test_prefill_is_the_reference(implementation: str, case: Case, written: str) -> None:
    """Whether or not the new tokens are in their pages already."""
    world = build(case, written=written, device=device(implementation))
    got = world.prefill(load("prefill", implementation))
    want = build(case, written="context").prefill(reference)
    torch.testing.assert_close(got.cpu(), want, **tolerances.OUT[case.dtype])


QUANTIZED = KERNELS
"""Implementations that read quantized pages."""

_LONG = Case(lens=(900, 530), new=(70, 300), ranking=None, heads=3, kv_heads=1, value_sum=False)
CODED = (
    *(chunks(case) for case in FORMATS),
    *(replace(case, new=tuple(min(s, b + 2) for b, s in enumerate(case.lens))) for case in FORMATS),
    *(
        replace(_LONG, format=fmt, dtype=dtype, block_size=block_size)
        for fmt in QUANTIZED_FORMATS
        for dtype, block_size in ((torch.bfloat16, 128), (torch.float16, 96), (torch.float32, 256))
    ),
)
CODED_FEW = tuple(replace(case, new=tuple(min(s, 5) for s in case.lens)) for case in TINY_FORMATS)


def rounded(case: Case, implementation: str) -> torch.Tensor:
    """The reference over pages of fp32 that hold what kernels multiply: what the codes of the context stand for.

    Those for CPUs round all of it to the model's type.
    """
    world, own, n = build(case, written="context"), case.tokens(), case.block_size
    tokens = Tokens(*([x.float() for x in side] for side in (own.query, own.key, own.value)))
    for b, (s, t) in enumerate(zip(case.lens, case.n_new, strict=True)):
        for block in range((s - t) // n):
            for head in range(case.kv_heads):
                decoded = decode_page(world.pages, int(world.block_table[b, block]), head)
                for part, to, rows in zip(("key", "value"), (tokens.key[b], tokens.value[b]), decoded, strict=True):
                    in_type = rows.to(case.dtype) if implementation == "cpu" else multiplied(case.layout, part, rows)
                    to[block * n : (block + 1) * n, head] = in_type
    plain = replace(case, format="model", group_size=None, dtype=torch.float32)
    return build(plain, tokens, written="context").prefill(reference).to(case.dtype)


@pytest.mark.parametrize(("implementation", "case"), each(CODED, tiny=CODED_FEW, implementations=QUANTIZED))
def test_prefill_of_quantized_pages_is_the_reference(implementation: str, case: Case) -> None:
    """Over what the codes stand for, or over that rounded to the model's type once: see `tolerances.OUT`."""
    got = build(case, written="context", device=device(implementation)).prefill(load("prefill", implementation)).cpu()
    exact, tolerance = build(case, written="context").prefill(reference), tolerances.OUT[case.dtype]
    if not torch.allclose(got, exact, **tolerance):
        widened = {"cpu": {torch.float32, torch.float16}, "triton": {torch.float32}}[implementation]
        assert case.dtype not in widened
        torch.testing.assert_close(got, rounded(case, implementation), **tolerance)


@pytest.mark.parametrize(("implementation", "fmt"), each(QUANTIZED_FORMATS, tiny=["int4", "kivi2"]))
def test_only_groups_that_are_not_finite_read_as_nan(implementation: str, fmt: str) -> None:
    """One NaN in V spoils its group of one token, which all rows see; and no other channel."""
    case = Case(lens=(70,), new=(3,), format=fmt, block_size=32, ranking=None, value_sum=False, dtype=torch.bfloat16)
    tokens = case.tokens()
    tokens.value[0][40, 1, 17] = torch.nan
    out = build(case, tokens, written="context", device=device(implementation)).prefill(load("prefill", implementation))
    group = case.layout.group("value")
    spoilt = torch.zeros(case.heads, case.head_size, dtype=torch.bool)
    spoilt[2:, 17 // group * group : 17 // group * group + group] = True
    assert out.isnan().cpu().equal(spoilt.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("implementation", "case"),
    each([chunks(FORMATS[5]), chunks(FORMATS[10])], tiny=CODED_FEW[3:5], implementations=QUANTIZED),
)
def test_nothing_but_the_codes_matters(implementation: str, case: Case) -> None:
    run, on = load("prefill", implementation), device(implementation)
    plain = build(case, written="context", device=on).prefill(run)
    assert plain.isfinite().all()
    assert build(case, written="context", poison=HUGE_BYTE, device=on).prefill(run).equal(plain)
    assert build(case, written="context", shuffle=1, device=on).prefill(run).equal(plain)


@pytest.mark.parametrize("implementation", ALL)
def test_prefill_by_hand(implementation: str) -> None:
    # D = 16, scale 1/4, q = 4 in channel 0: the logit of a token is its K in channel 0, ln of 1, 3 | 4, 8.
    # Two tokens are cached, two are new. V is 8, 4 | 6, 10.
    # Row 0 sees 1, 3, 4 of 8: (8 + 12 + 24) / 8 = 5.5. Row 1 sees 1, 3, 4, 8 of 16: (8 + 12 + 24 + 80) / 16 = 7.75.
    case = Case(heads=1, kv_heads=1, head_size=16, lens=(4,), new=(2,), ranking=None, value_sum=False)
    query, key = torch.zeros(2, 1, 16), torch.zeros(4, 1, 16)
    query[:, 0, 0] = 4
    key[:, 0, 0] = torch.tensor([1.0, 3.0, 4.0, 8.0]).log()
    value = torch.tensor([8.0, 4.0, 6.0, 10.0])[:, None, None].repeat(1, 1, 16)
    world = build(case, Tokens([query], [key], [value]), written="context", device=device(implementation))
    out = world.prefill(load("prefill", implementation)).cpu()
    torch.testing.assert_close(out, torch.tensor([5.5, 7.75])[:, None, None].repeat(1, 1, 16))


@pytest.mark.parametrize(("implementation", "case"), each([chunks(TINY[0]), chunks(TINY[1])], tiny=[chunks(TINY[1])]))
def test_nothing_but_the_tokens_matters(implementation: str, case: Case) -> None:
    run, on = load("prefill", implementation), device(implementation)
    plain = build(case, written="context", device=on).prefill(run)
    assert plain.isfinite().all()
    assert build(case, written="context", poison=HUGE_BYTE, device=on).prefill(run).equal(plain)
    assert build(case, written="context", shuffle=1, device=on).prefill(run).equal(plain)
    assert plain._base is not None
    assert plain._base[:, case.heads].isnan().all()


@pytest.mark.parametrize("implementation", ALL)
def test_a_chunked_prompt_is_the_whole_prompt(implementation: str) -> None:
    whole = Case(lens=(40,), new=(40,), heads=2, kv_heads=1)
    tokens, run, on = whole.tokens(), load("prefill", implementation), device(implementation)
    want = build(whole, tokens, written="context", device=on).prefill(run)
    done = 0
    for upto in (1, 16, 29, 40):
        case = replace(whole, lens=(upto,), new=(upto - done,))
        part = Tokens([tokens.query[0][done:upto]], [tokens.key[0][:upto]], [tokens.value[0][:upto]])
        got = build(case, part, written="context", device=on).prefill(run)
        torch.testing.assert_close(got, want[done:upto], **tolerances.OUT[case.dtype])
        done = upto


@pytest.mark.parametrize("implementation", ALL)
def test_later_tokens_do_not_leak(implementation: str) -> None:
    case = Case(lens=(40,), new=(24,), heads=2, kv_heads=1)
    tokens, run, on = case.tokens(), load("prefill", implementation), device(implementation)
    plain = build(case, tokens, written="context", device=on).prefill(run)
    tokens.key[0][30:] *= 1000  # positions 30 on: rows 14 on
    tokens.value[0][30:] *= -1000
    changed = build(case, tokens, written="context", device=on).prefill(run)
    assert changed[:14].equal(plain[:14])
    assert not changed[14:].isclose(plain[14:]).any(-1).any()


@pytest.mark.parametrize("implementation", ALL)
def test_one_new_token_is_a_dense_decode(implementation: str) -> None:
    case = Case(lens=(1, 16, 17, 33), dtype=torch.bfloat16)
    on = device(implementation)
    as_prefill = build(case, written="context", device=on).prefill(load("prefill", implementation))
    as_decode = build(case, device=on).decode(load("dense_decode", implementation))
    torch.testing.assert_close(as_prefill, as_decode, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("group", [3, 8])
def test_a_group_of_equal_heads_is_one_head(implementation: str, group: int) -> None:
    case = Case(heads=group, kv_heads=1, lens=(17, 20), new=(17, 3))
    tokens, run, on = case.tokens(), load("prefill", implementation), device(implementation)
    alone = Tokens([q[:, :1] for q in tokens.query], tokens.key, tokens.value)
    tokens.query = [q[:, :1].repeat(1, group, 1) for q in tokens.query]
    grouped = build(case, tokens, written="context", device=on).prefill(run)
    single = build(replace(case, heads=1), alone, written="context", device=on).prefill(run)
    torch.testing.assert_close(grouped, single.expand_as(grouped), **tolerances.OUT[case.dtype])
