"""`quest_decode`: the spans read and the output given those spans, exact cases, and invariants."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import HUGE_BYTE, THREADS, Case, Tokens, build, each, has, load, threaded
from tests.ops.cases import device_of as device
from tests.ops.shapes import SPAN_FORMATS, SPANS, TINY_SPAN_FORMATS, TINY_SPANS
from tests.ops.spans_checks import assert_right, attend, choose, upper_bounds
from tests.ops.sparq_checks import tokens_read
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference
from vllm_sparq.ops.quest_decode.reference import quest_decode as reference
from vllm_sparq.reads import SpansRead, spans_of

IMPLEMENTATIONS = has("quest_decode")
CASES, CODED = (*SPANS, *TINY_SPANS), (*SPAN_FORMATS, *TINY_SPAN_FORMATS)
BASE = SPANS[0]


def reads(case: Case, turn: int) -> SpansRead:
    """The least that may be read, a slope, a floor that is no multiple of 16, dense reads up to the median."""
    longest = max(case.lens)
    return (
        SpansRead(min_k=1),
        SpansRead(min_k=16, k_per_token=Fraction(7, 16)),
        SpansRead(min_k=longest // 2 + 7, dense_below=sorted(case.lens)[len(case.lens) // 2]),
    )[turn]


@pytest.mark.parametrize(("implementation", "case"), each(SPANS, tiny=TINY_SPANS, implementations=IMPLEMENTATIONS))
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_quest_decode_is_right(implementation: str, case: Case, turn: int) -> None:
    """The reference too."""
    run = load("quest_decode", implementation)
    assert_right(run, case, case.tokens(), reads(case, turn), device(implementation))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "case"), each(SPAN_FORMATS, tiny=TINY_SPAN_FORMATS, implementations=IMPLEMENTATIONS)
)
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_quantized_pages_are_right(implementation: str, case: Case, turn: int) -> None:
    """The reference too, which reads what the oracle does. Spans are ranked by K as it was before it was quantized."""
    run, triton = load("quest_decode", implementation), implementation == "triton"
    given = case, case.tokens(), reads(case, turn), device(implementation)
    probes = case.heads == case.kv_heads if triton else implementation != "reference"
    assert_right(run, *given, rounds=triton, probes=probes)


def test_by_hand() -> None:
    # D = 16, four spans and a token: S = 65, 5 spans. Two heads with q_0 = (1, -1, 0, ..) and q_1 = (1, 2, 0, ..), so
    # a = (2, 2) and b = (0, -1) on the first two channels.
    # Span 0: K = (1, 0): u = 2. Span 1: K_0 from -8 to 0, K_1 = 0: u = 2 * 0 = 0. Span 2: K_1 from -5 to 1:
    # u = 2 * 1 + -1 * -5 = 7, although its tokens have 5 - 10 = -5 and -1 + 2 = 1.
    # Span 3: K_0 = 3 at one token: u = 6. Span 4, the newest: K_0 = -100, u = -200.
    # min_k = 48: three spans, 4 and 2 and 3. With scale 0 the output is the plain mean of V over their 33 tokens.
    keys, values = torch.zeros(65, 1, 16), torch.arange(65.0)[:, None, None].repeat(1, 1, 16)
    keys[:16, 0, 0] = 1
    keys[16:31, 0, 0] = -8
    keys[33, 0, 1], keys[34, 0, 1] = -5, 1
    keys[50, 0, 0] = 3
    keys[64, 0, 0] = -100
    query = torch.zeros(1, 2, 16)
    query[0, 0, :2], query[0, 1, :2] = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0])
    case = replace(BASE, heads=2, kv_heads=1, head_size=16, lens=(65,))
    world = build(case, Tokens([query], [keys], [values]))
    out = world.empty_out()
    given = world.query[:1], world.pages, world.block_table, world.seq_lens
    reference(*given, read=SpansRead(min_k=48), scale=0.0, out=out)
    assert out.unique().tolist() == [pytest.approx((sum(range(32, 64)) + 64) / 33)]
    upper, _ = upper_bounds(query[0].double().numpy(), keys[:, 0].double().numpy())
    assert upper.tolist() == [2, 0, 7, 6, -200]
    assert choose(upper, 3).tolist() == [2, 3, 4]
    own = (x[:, 0].double().numpy() for x in (keys, values))
    oracle = attend(query[0].double().numpy(), *own, np.array([4]), case, None)
    assert oracle.tolist() == [[64.0] * 16] * 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("block_size", "dtype"), [(16, torch.float32), (128, torch.bfloat16)])
def test_planted_tokens_bring_their_spans(implementation: str, block_size: int, dtype: torch.dtype) -> None:
    """One token along the query in a span is enough, wherever it is in the span, and first and last spans count too."""
    case = replace(BASE, heads=3, kv_heads=1, block_size=block_size, dtype=dtype, lens=(200,))
    tokens, on = case.tokens(), device(implementation)
    direction = tokens.query[0][0, 0].sign()
    tokens.query[0][0] = tokens.query[0][0].abs() * direction
    tokens.key[0] = (tokens.key[0] / 8).to(case.dtype)
    tokens.key[0][[0, 79, 130, 180]] += 4 * direction
    read, run = SpansRead(min_k=5 * 16), load("quest_decode", implementation)
    want = [t for p in (0, 4, 8, 11) for t in range(p * 16, p * 16 + 16)] + list(range(192, 200))
    assert tokens_read(run, build(case, tokens, device=on), read)[0, 0].tolist() == want
    assert_right(run, case, tokens, read, on)


TIES = (
    replace(BASE, dtype=torch.bfloat16, lens=(165,)),
    replace(BASE, heads=1, kv_heads=1, block_size=128, lens=(2000,)),
)


@pytest.mark.parametrize(("implementation", "case"), each(TIES, tiny=TIES[:1], implementations=IMPLEMENTATIONS))
@pytest.mark.parametrize("newest", ["alike", "worst"])
def test_ties_go_to_the_oldest(implementation: str, case: Case, newest: str) -> None:
    """All spans alike, exactly: whole numbers. The newest is read all the same."""
    s, on = case.lens[0], device(implementation)
    tokens = case.tokens()
    tokens.query[0][:] = 1
    tokens.key[0][:] = torch.arange(case.head_size).fmod(5).to(case.dtype)
    if newest == "worst":
        tokens.key[0][s // 16 * 16 :] = -8
    world, read = build(case, tokens, device=on), SpansRead(min_k=70)
    for chosen in tokens_read(load("quest_decode", implementation), world, read).values():
        assert chosen.tolist() == [*range(3 * 16), *range((spans_of(s) - 1) * 16, s)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_are_not_finite_rank_as_zero(implementation: str) -> None:
    """In full blocks and in the unfinished one: spans 0, 2, 4 and 8 are worth no more than 0, so 1 and 3 are read."""
    case = replace(BASE, heads=1, kv_heads=1, block_size=32, lens=(156,))
    tokens, on = case.tokens(), device(implementation)
    tokens.query[0][:] = 1
    key = tokens.key[0]
    key[:] = -1
    key[16:32], key[48:64] = 1, 2
    for first, bad in ((0, torch.nan), (32, torch.inf), (64, -torch.inf), (128, torch.inf), (133, torch.nan)):
        key[first + 3] = bad
    run, world, read = load("quest_decode", implementation), build(case, tokens, device=on), SpansRead(min_k=48)
    assert tokens_read(run, world, read)[0, 0].tolist() == [*range(16, 32), *range(48, 64), *range(144, 156)]
    assert world.decode(run, read=read).isfinite().all()


@pytest.mark.parametrize(
    ("implementation", "case"), each(SPANS[:4], tiny=TINY_SPANS[:1], implementations=IMPLEMENTATIONS)
)
def test_with_nothing_left_out_it_is_dense(implementation: str, case: Case) -> None:
    run, longest = load("quest_decode", implementation), max(case.lens)
    world, want = build(case, device=device(implementation)), build(case).decode(dense_reference)
    for read in (SpansRead(min_k=16 * spans_of(longest)), SpansRead(min_k=1, dense_below=longest + 1)):
        torch.testing.assert_close(world.decode(run, read=read).cpu(), want, **tolerances.OUT[case.dtype])
    assert not SpansRead(min_k=16 * spans_of(longest) - 1).is_dense(longest)


@pytest.mark.parametrize(
    ("implementation", "case"),
    each([BASE, SPAN_FORMATS[0], SPAN_FORMATS[4]], tiny=TINY_SPANS[:1], implementations=IMPLEMENTATIONS),
)
def test_nothing_but_the_tokens_matters(implementation: str, case: Case) -> None:
    """Other page ids, other garbage: the same bits. Padding rows are zero, and the gap between rows keeps its NaN."""
    run, on, read = load("quest_decode", implementation), device(implementation), SpansRead(min_k=48)
    plain = build(case, device=on).decode(run, read=read)
    assert plain.isfinite().all()
    assert build(case, poison=HUGE_BYTE, device=on).decode(run, read=read).equal(plain)
    assert build(case, shuffle=1, device=on).decode(run, read=read).equal(plain)
    for b, s in enumerate(case.lens):
        assert s > 0 or not plain[b].any()
    assert plain._base is not None
    assert plain._base[:, case.heads].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_of_one_is_a_row_of_the_batch(implementation: str) -> None:
    case, read = replace(BASE, lens=(65, 49, 80)), SpansRead(min_k=48)
    tokens, run, on = case.tokens(), load("quest_decode", implementation), device(implementation)
    together = build(case, tokens, device=on).decode(run, read=read)
    for b, s in enumerate(case.lens):
        row = Tokens(tokens.query[b : b + 1], tokens.key[b : b + 1], tokens.value[b : b + 1])
        alone = build(replace(case, lens=(s,)), row, device=on).decode(run, read=read)
        torch.testing.assert_close(alone[0], together[b], **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_zero_query_reads_the_oldest_spans(implementation: str) -> None:
    case, on = replace(BASE, heads=2, kv_heads=1, lens=(100,)), device(implementation)
    tokens = case.tokens()
    tokens.query[0][:] = 0
    out = build(case, tokens, device=on).decode(load("quest_decode", implementation), read=SpansRead(min_k=1)).cpu()
    want = tokens.value[0][[*range(32), *range(96, 100)], 0].mean(0)
    torch.testing.assert_close(out[0], want.expand(2, -1), **tolerances.OUT[case.dtype])


@pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels of this op")
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("case", [SPANS[6], SPANS[-1], SPAN_FORMATS[6]], ids=str)
def test_threads_do_not_matter(n_threads: int, case: Case) -> None:
    run, world, read = load("quest_decode", "cpu"), build(case), SpansRead(min_k=100)
    other = threaded(run.__wrapped__, n_threads)  # type: ignore[attr-defined]
    assert n_threads != THREADS
    torch.testing.assert_close(
        world.decode(other, read=read), world.decode(run, read=read), **tolerances.OUT[case.dtype]
    )


@pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no CPU kernels of this op")
@pytest.mark.parametrize("format", ["model", "int4", "kivi4"])
def test_what_is_read_of_a_cut_context_is_cut_too(format: str) -> None:
    case = replace(BASE, heads=4, kv_heads=1, block_size=128, lens=(2100, 40), format=format)
    assert_right(load("quest_decode", "cpu"), case, case.tokens(), SpansRead(min_k=1500))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"min_k": 80}, "spans read"), ({"min_k": 1000}, "spans read"), ({}, "a better span|off by|newest")],
)
def test_a_wrong_answer_is_refused(wrong: dict[str, int], message: str) -> None:
    """Guard of this file's own check."""
    case, read = replace(BASE, lens=(200,)), SpansRead(min_k=64)

    def run(query: torch.Tensor, *args: object, read: SpansRead, **kwargs: object) -> None:
        query = query if wrong else query.flip(2)
        reference(query, *args, read=replace(read, **wrong), **kwargs)  # type: ignore[arg-type]

    assert_right(reference, case, case.tokens(), read)
    with pytest.raises(AssertionError, match=message):
        assert_right(run, case, case.tokens(), read)


LONG = replace(BASE, heads=1, kv_heads=1, head_size=256, block_size=256, lens=(2500,))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", ["random", "rising", "tied"])
def test_a_row_whose_spans_are_shared_out(implementation: str, order: str) -> None:
    """157 spans, which Triton ranks and picks in two parts; the best ones in both, in the last alone, all alike."""
    tokens, on = LONG.tokens(), device(implementation)
    if order != "random":
        tokens.query[0][:] = 1
        tokens.key[0][:] = torch.arange(2500.0)[:, None, None] // 256 if order == "rising" else 1
    run, read = load("quest_decode", implementation), SpansRead(min_k=400)
    assert_right(run, LONG, tokens, read, on)
    if order == "tied":
        chosen = tokens_read(run, build(LONG, tokens, device=on), read)[0, 0]
        assert chosen.tolist() == [*range(24 * 16), *range(2496, 2500)]


OVERFLOWS = [(name, kind) for name in IMPLEMENTATIONS for kind in ("infinite", "nan") if (name, kind) != ("cpu", "nan")]
"""A sum that is NaN is the greatest to torch and Triton. The kernels of the CPU, where NaN is no number, may differ."""


@pytest.mark.parametrize(("implementation", "kind"), OVERFLOWS)
def test_bounds_may_overflow(implementation: str, kind: str) -> None:
    """Sums beyond fp32: spans 5 and 8 before all, span 0 after all, and nothing else is disturbed."""
    case, big = replace(BASE, heads=2, kv_heads=1, block_size=32, lens=(156,)), 3e19
    tokens, on = case.tokens(), device(implementation)
    tokens.query[0][:], tokens.key[0][:] = 0, 0
    tokens.query[0][..., :2] = 1e19  # 2e19 * 3e19 is infinite; 1e19 * 3e19, the logit of a head, is not
    for span, first, second in ((0, -big, 0), (5, big, -big * (kind == "nan")), (8, big, -big * (kind == "nan"))):
        tokens.key[0][span * 16 : span * 16 + 16, 0, :2] = torch.tensor([first, second])
    run, world = load("quest_decode", implementation), build(case, tokens, device=on)

    def flat(*args: object, scale: float, **options: object) -> None:
        run(*args, scale=2e-38, **options)  # so that logits are 6 or 0, and every token read leaves its mark

    for n, want in ((3, [5, 8, 9]), (9, [1, 2, 3, 4, 5, 6, 7, 8, 9])):
        chosen = tokens_read(flat, world, SpansRead(min_k=16 * n))[0, 0]
        assert np.unique(chosen // 16).tolist() == want
