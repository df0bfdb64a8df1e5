"""`sparq_decode`: the tokens read and the output given those tokens, exact cases, and invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, HUGE_BYTE, THREADS, Case, Tokens, build, each, load, threaded
from tests.ops.cases import device_of as device
from tests.ops.oracle import numbers, repository
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from tests.ops.sparq_checks import assert_right, ranked_by, tokens_read
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference
from vllm_sparq.ops.sparq_decode.reference import sparq_decode as reference
from vllm_sparq.reads import SparqRead


def reads(case: Case, i: int) -> SparqRead:
    """The i-th of a set of reads that fits the case: r of 1, odd, a quarter, D; all floors and reductions."""
    d, longest = case.head_size, max(case.lens)
    return SparqRead(
        r=(d // 4, d // 8 + 1, d, 1, d // 2 + 1)[i % 5],
        min_k=max(1, longest // (3, 5, 2)[i % 3]),
        k_per_token=(Fraction(0), Fraction(1, 16))[i % 2],
        local=(None, 0, 1, 10**6)[i % 4] if i % 5 != 3 else None,
        alpha_floor=(0.0, 0.5, 1.0)[i % 3],
        group_reduce=("logits", "probs")[i // 2 % 2],  # type: ignore[arg-type]
        dense_below=(0, 17)[i % 2],
    )


LONG = (
    Case(heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(900, 3, 0, 513)),
    Case(heads=4, kv_heads=4, head_size=64, block_size=64, dtype=torch.float16, lens=(320, 0, 700), ranking="int8"),
    Case(heads=4, kv_heads=1, head_size=128, block_size=32, dtype=torch.bfloat16, lens=(640, 333)),
    Case(heads=2, kv_heads=1, head_size=64, block_size=256, dtype=torch.float32, lens=(1500,)),
)
CASES = (*SHAPES, *LONG)
NUMBERED = {case: i for i, case in enumerate((*CASES, *TINY))}


@pytest.mark.parametrize(("implementation", "case"), each(CASES, tiny=TINY))
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_sparq_decode_is_right(implementation: str, case: Case, turn: int) -> None:
    """The reference too."""
    read = reads(case, 3 * NUMBERED[case] + turn)
    assert_right(load("sparq_decode", implementation), case, case.tokens(), read, device(implementation))


def ranked(case: Case) -> Case:
    """With what ranks the tokens, and value sums."""
    return replace(case, ranking=None if case.layout.channel_keys else case.ranking or "int4", value_sum=True)


LONG_FORMATS = tuple(
    ranked(replace(LONG[0], format=fmt, lens=lens))
    for fmt, lens in (("int8", (513,)), ("int4", (900, 3, 512)), ("kivi4", (384, 500)), ("kivi2", (0, 513)))
)
QUANTIZED_CASES = (*map(ranked, FORMATS), *LONG_FORMATS)
PROBED = (
    TINY_FORMATS[0],
    replace(TINY_FORMATS[3], heads=1, kv_heads=1, head_size=64, group_size=16, lens=(36,), dtype=torch.bfloat16),
)
"""For the Triton interpreter: few launches tell what they read."""


READ_BY = [
    pytest.param(*row.values, turn, id=f"{turn}-{row.id}")
    for row in each(QUANTIZED_CASES, tiny=PROBED)
    for turn in ((0,) if row.values[0] == "reference" else (0, 1))
]
"""Every case by two reads; the reference, which takes longest, by one."""


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "case", "turn"), READ_BY)
def test_quantized_pages_are_read(implementation: str, case: Case, turn: int) -> None:
    """The reference too, which reads what the oracle does."""
    read, triton = reads(case, 2 * (*QUANTIZED_CASES, *PROBED).index(case) + turn), implementation == "triton"
    run, on, probes = load("sparq_decode", implementation), device(implementation), implementation != "reference"
    assert_right(run, case, case.tokens(), read, on, rounds=triton, probes=probes)


@pytest.mark.parametrize(("implementation", "case"), each(TINY_FORMATS, implementations=["triton"]))
@pytest.mark.parametrize("turn", [0, 1])
def test_answers_over_quantized_pages(implementation: str, case: Case, turn: int) -> None:
    """Of kernels that are too slow here to find out what they read."""
    run, on = load("sparq_decode", implementation), device(implementation)
    read = reads(case, 5 * turn + TINY_FORMATS.index(case))
    assert_right(run, case, case.tokens(), read, on, rounds=True, probes=False)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("ranking", ["int4", "int8", "model"])
@pytest.mark.parametrize("heads", [1, 3])
def test_planted_tokens_are_found(implementation: str, ranking: str, heads: int) -> None:
    """Keys with a gap around the k-th place leave nothing to argue about: the tokens along the query are read."""
    case = Case(heads=heads, kv_heads=1, ranking=ranking, lens=(100,), dtype=torch.bfloat16)
    tokens, planted, on = case.tokens(), [0, 3, 15, 16, 40, 63, 64, 95, 96, 97], device(implementation)
    direction = tokens.query[0][0, 0].sign()
    tokens.query[0][0] = tokens.query[0][0].abs() * direction
    tokens.key[0] = (tokens.key[0] / 4).to(case.dtype)
    tokens.key[0][planted] += 2 * direction
    read, run = SparqRead(r=24, min_k=len(planted), local=0, alpha_floor=1.0), load("sparq_decode", implementation)
    assert tokens_read(run, build(case, tokens, device=on), read)[0, 0].tolist() == [*planted, 99]
    assert_right(run, case, tokens, read, on)


def exact_tokens(case: Case, s: int, keys: torch.Tensor, values: torch.Tensor) -> Tokens:
    """Queries of +-1 in every channel: with r = D / 4 the temperature is 2 and a score a whole multiple of 2 scale."""
    signs = torch.tensor([1.0, -1.0]).repeat(case.head_size // 2)
    query = signs.repeat(1, case.heads, 1).to(case.dtype)
    assert keys.shape == values.shape == (s, case.kv_heads, case.head_size)
    return Tokens([query], [keys.to(case.dtype)], [values.to(case.dtype)])


EXACT = [
    Case(heads=g, kv_heads=1, head_size=d, block_size=n, dtype=dtype, ranking=ranking, lens=(3 * n + 5,))
    for g, d, n, dtype, ranking in [
        (1, 64, 16, torch.float32, "int4"),
        (4, 64, 16, torch.bfloat16, "int4"),
        (2, 64, 32, torch.float16, "int8"),
        (8, 256, 16, torch.bfloat16, "int8"),
        (4, 64, 64, torch.bfloat16, "model"),
        (3, 64, 128, torch.bfloat16, "int4"),
        (2, 64, 256, torch.float32, "int4"),  # 773 tokens: kernels cut them
    ]
]


@pytest.mark.parametrize(("implementation", "case"), each(EXACT, tiny=EXACT[1:3]))
@pytest.mark.parametrize("reduce", ["logits", "probs"])
def test_ties_go_to_the_oldest(implementation: str, case: Case, reduce: str) -> None:
    """All keys alike: every score ties, and the weights are 1 / n. V of token t is t, so the output tells the tokens.

    n_selected = k + 1 tokens: the oldest k - local and the newest local + 1. alpha = (k + 1) / S.
    """
    s, k, local = case.lens[0], 21, 6
    keys = torch.tensor([3.0, 1.0]).repeat(case.head_size // 2).expand(s, 1, -1)
    values = torch.arange(float(s))[:, None, None].expand(s, 1, case.head_size)
    tokens = exact_tokens(case, s, keys, values)
    chosen = [*range(k - local), *range(s - local - 1, s)]
    position = tokens.value[0][:, 0, 0].double()  # as the model's type holds it
    run = load("sparq_decode", implementation)
    for floor in (0.0, 0.5, 1.0):
        read = SparqRead(r=case.head_size // 4, min_k=k, local=local, alpha_floor=floor, group_reduce=reduce)  # type: ignore[arg-type]
        out = build(case, tokens, device=device(implementation)).decode(run, read=read).cpu()
        alpha = max(floor, (k + 1) / s)
        want = alpha * position[chosen].mean() + (1 - alpha) * position.mean()
        tolerance = {"rtol": max(1e-5, torch.finfo(case.dtype).eps), "atol": 0.0}
        torch.testing.assert_close(out, torch.full_like(out, float(want)), **tolerance)


@pytest.mark.parametrize(("implementation", "case"), each(EXACT, tiny=EXACT[1:3]))
@pytest.mark.parametrize("seed", [0, 1])
def test_integers_are_ranked_exactly(implementation: str, case: Case, seed: int) -> None:
    """Keys of small integers in steps of one (each channel of a page spans all codes): scores are exact in any order
    and type, many tie, and the k-th place lies among equals that span full pages and the unfinished one.
    """
    s, d, n = case.lens[0], case.head_size, case.block_size
    top = 15.0 if case.ranking == "int4" else 255.0
    gen = torch.Generator().manual_seed(seed)
    signs = torch.tensor([1.0, -1.0]).repeat(d // 2)
    # A score is 2 scale times the sum of signs * key over D / 4 channels: here -2 .. 2 of them, so ties abound.
    base = torch.randint(0, 3, (s, d // 2), generator=gen).repeat_interleave(2, 1).float()
    level = torch.randint(-2, 3, (s,), generator=gen)
    base[:, 0] += level.clamp(0)
    base[:, 1] += (-level).clamp(0)
    base[0::n] = 0  # these two have score 0 and make every channel of a page span its codes
    base[1::n] = top
    tokens = exact_tokens(case, s, base[:, None], torch.zeros(s, 1, d))
    score = (base[:, : d // 4] * signs[: d // 4]).sum(1)
    assert score.abs().max() == 2
    k = int((score > 0).sum()) + 5  # five places left for the many zeros
    by_rank = (score[:-1] * s - torch.arange(s - 1)).sort(descending=True).indices
    world, read = build(case, tokens, device=device(implementation)), SparqRead(r=d // 4, min_k=k, local=0)
    chosen = tokens_read(load("sparq_decode", implementation), world, read)[0, 0]
    assert chosen.tolist() == sorted([*by_rank[:k].tolist(), s - 1])


SMALL = [
    replace(TINY[0], lens=(1, 17, 33, 47)),
    replace(TINY[1], lens=(18, 0, 40)),
    replace(TINY[2], lens=(31, 65)),
]


@pytest.mark.parametrize(("implementation", "case"), each(SMALL, tiny=SMALL[2:]))
@pytest.mark.parametrize("beyond", [0, 1])
def test_with_nothing_left_out_it_is_dense(implementation: str, case: Case, beyond: int) -> None:
    """k + 1 >= S is dense; k + 1 = S - 1 leaves one token out."""
    run, longest = load("sparq_decode", implementation), max(case.lens)
    world = build(case, device=device(implementation))
    got = world.decode(run, read=SparqRead(r=3, min_k=longest - 1 + beyond, alpha_floor=0.0)).cpu()
    want = build(case).decode(dense_reference)
    torch.testing.assert_close(got, want, **tolerances.OUT[case.dtype])
    read = SparqRead(r=case.head_size, min_k=longest - 2, alpha_floor=1.0)
    assert not read.is_dense(longest)
    assert_right(run, case, case.tokens(), read, device(implementation))
    assert {len(positions) for positions in tokens_read(run, world, read).values()} == {longest - 1}


@pytest.mark.parametrize("implementation", ALL)
def test_the_share_of_large_scores(implementation: str) -> None:
    """In one channel q = 129/128 and K = 44 or 43, V = 1 or 0: what is read has the scores 44.34, which bf16 would
    round to 44.25, a tenth off its exponential, and all others 43.34. n = 9 of S = 48 tokens are read, the newest.

    alpha = 9 / (9 + 39 exp(-q)); out = alpha + (1 - alpha) n / S.
    """
    case = Case(heads=2, kv_heads=1, head_size=64, dtype=torch.bfloat16, ranking="model", value_sum=True, lens=(48,))
    tokens, newest = case.tokens(), torch.arange(48) >= 39
    for held in (tokens.query[0], tokens.key[0], tokens.value[0]):
        held.zero_()
    tokens.query[0][..., 5] = 129 / 128 / case.scale
    tokens.key[0][:, 0, 5] = 43.0 + newest
    tokens.value[0][newest] = 1
    read = SparqRead(r=1, min_k=8, local=8, alpha_floor=0.0)
    out = build(case, tokens, device=device(implementation)).decode(load("sparq_decode", implementation), read=read)
    alpha = 9 / (9 + 39 * math.exp(-129 / 128))
    want = torch.full_like(out, alpha + (1 - alpha) * 9 / 48)
    torch.testing.assert_close(out, want, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize(("implementation", "kv_heads"), each([1, 4], tiny=[1]))
def test_with_all_channels_it_is_the_exact_top_k(implementation: str, kv_heads: int) -> None:
    """r = D on keys of the model's type, no window, one head a group: out = sum of the k largest (and the current)
    probabilities times V, plus the missing mass times the mean: alpha is the exact mass."""
    case = Case(heads=kv_heads, kv_heads=kv_heads, ranking="model", lens=(60, 100))
    tokens, read = case.tokens(), SparqRead(r=64, min_k=9, local=0, alpha_floor=0.0)
    world = build(case, tokens, device=device(implementation))
    got = world.decode(load("sparq_decode", implementation), read=read).cpu()
    for b, (query, key, value) in enumerate(zip(tokens.query, tokens.key, tokens.value, strict=True)):
        for h in range(kv_heads):
            p = torch.softmax(case.scale * key[:, h].double() @ query[0, h].double(), 0)
            kept = torch.zeros_like(p)
            kept[p[:-1].topk(9).indices] = 1
            kept[-1] = 1
            v = value[:, h].double()
            want = (p * kept) @ v + (p * (1 - kept)).sum() * v.mean(0)
            torch.testing.assert_close(got[b, h].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("implementation", "case"), each(SMALL, tiny=SMALL[1:2]))
def test_nothing_but_the_tokens_matters(implementation: str, case: Case) -> None:
    """Other page ids, other garbage: the same bits. Padding rows are zero, and the gap between rows keeps its NaN."""
    run, on = load("sparq_decode", implementation), device(implementation)
    for floor in (0.0, 1.0):
        read = SparqRead(r=7, min_k=8, alpha_floor=floor)
        plain = build(case, device=on).decode(run, read=read)
        assert plain.isfinite().all()
        assert build(case, poison=HUGE_BYTE, device=on).decode(run, read=read).equal(plain)
        assert build(case, shuffle=1, device=on).decode(run, read=read).equal(plain)
        for b, s in enumerate(case.lens):
            assert s > 0 or not plain[b].any()
        assert plain._base is not None
        assert plain._base[:, case.heads].isnan().all()


@pytest.mark.parametrize("implementation", ALL)
def test_pages_without_sums_do_without_the_mean(implementation: str) -> None:
    case, read = Case(lens=(40, 33), dtype=torch.bfloat16), SparqRead(r=16, min_k=8, alpha_floor=1.0)
    run, tokens, on = load("sparq_decode", implementation), case.tokens(), device(implementation)
    with_sums = build(case, tokens, device=on).decode(run, read=read)
    assert build(replace(case, value_sum=False), tokens, device=on).decode(run, read=read).equal(with_sums)


@pytest.mark.parametrize("implementation", ALL)
def test_a_batch_of_one_is_a_row_of_the_batch(implementation: str) -> None:
    case, read = replace(SMALL[0], lens=(47, 17, 33)), SparqRead(r=7, min_k=8, alpha_floor=0.0)
    tokens, run, on = case.tokens(), load("sparq_decode", implementation), device(implementation)
    together = build(case, tokens, device=on).decode(run, read=read)
    for b, s in enumerate(case.lens):
        row = Tokens(tokens.query[b : b + 1], tokens.key[b : b + 1], tokens.value[b : b + 1])
        alone = build(replace(case, lens=(s,)), row, device=on).decode(run, read=read)
        torch.testing.assert_close(alone[0], together[b], **tolerances.OUT[case.dtype])


@pytest.mark.parametrize(("implementation", "group"), each([3, 4, 8], tiny=[4]))
@pytest.mark.parametrize("reduce", ["logits", "probs"])
def test_a_group_of_equal_heads_is_one_head(implementation: str, group: int, reduce: str) -> None:
    case = Case(heads=group, kv_heads=1, lens=(40, 33))
    tokens, run, on = case.tokens(), load("sparq_decode", implementation), device(implementation)
    read = SparqRead(r=16, min_k=8, alpha_floor=0.0, group_reduce=reduce)  # type: ignore[arg-type]
    alone = Tokens([q[:, :1] for q in tokens.query], tokens.key, tokens.value)
    tokens.query = [q[:, :1].repeat(1, group, 1) for q in tokens.query]
    grouped = build(case, tokens, device=on).decode(run, read=read)
    single = build(replace(case, heads=1), alone, device=on).decode(run, read=read)
    torch.testing.assert_close(grouped, single.expand_as(grouped), **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", ["zero query", "head off the channels", "constant keys", "huge logits"])
def test_degenerate_scores(implementation: str, kind: str) -> None:
    case, read = Case(heads=2, kv_heads=1, lens=(40, 65)), SparqRead(r=8, min_k=8, local=2, alpha_floor=0.0)
    tokens = case.tokens()
    for query, key in zip(tokens.query, tokens.key, strict=True):
        if kind == "zero query":
            query[:] = 0
        elif kind == "head off the channels":  # the second head has nothing on the channels of the first
            query[:, 0, :8], query[:, 1, :8] = 50, 0
        elif kind == "constant keys":
            key[:] = key[:1].clone()
        else:
            query *= 200
    run = load("sparq_decode", implementation)
    got = build(case, tokens, device=device(implementation)).decode(run, read=read).cpu()
    world = build(case, tokens)
    for b, s in enumerate(case.lens):
        query = tokens.query[b][0].double().numpy()
        key, value = (x[b][:, 0].double().numpy() for x in (tokens.key, tokens.value))
        want = repository(query, ranked_by(world, key, b, 0)[0], key, value, **numbers(read, s, 64)).out
        torch.testing.assert_close(got[b].double(), torch.from_numpy(want), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("implementation", "reduce"), each(["logits", "probs"], tiny=["probs"]))
def test_a_long_context_is_cut(implementation: str, reduce: str) -> None:
    """One row and more tokens than any implementation gives to one thread or program."""
    case = Case(heads=2, kv_heads=1, head_size=256, block_size=128, lens=(1100,))
    read = SparqRead(r=32, min_k=150, alpha_floor=0.1, group_reduce=reduce)  # type: ignore[arg-type]
    assert_right(load("sparq_decode", implementation), case, case.tokens(), read, device(implementation))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("order", ["equal", "rising", "falling", "random"])
@pytest.mark.parametrize("reduce", ["logits", "probs"])
def test_long_streams(implementation: str, order: str, reduce: str) -> None:
    """One thread and 2000 tokens, so that a kernel that streams scores through a small buffer has to empty it often."""
    s = 2000
    case = Case(heads=2, kv_heads=1, head_size=256, lens=(s,), ranking="model")
    tokens = case.tokens()
    tokens.query[0] = tokens.query[0].abs()
    level = {"equal": torch.zeros(s), "rising": torch.arange(s) / s, "falling": -torch.arange(s) / s}
    if order != "random":
        tokens.key[0] = level[order][:, None, None].repeat(1, 1, 256)
    read = SparqRead(r=64, min_k=40, local=4, alpha_floor=0.5 * (order == "random"), group_reduce=reduce)  # type: ignore[arg-type]
    run = load("sparq_decode", implementation)
    run = threaded(run, 1)
    chosen = tokens_read(run, build(case, tokens), read)[0, 0].tolist()
    newest = list(range(s - 5, s))
    if order != "random":
        assert chosen == (list(range(s - 41, s)) if order == "rising" else [*range(36), *newest])
    assert_right(run, case, tokens, read)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_threads_do_not_matter(n_threads: int) -> None:
    case = LONG[0]
    run, world = load("sparq_decode", "cpu"), build(case)
    other = threaded(run.__wrapped__, n_threads)  # type: ignore[attr-defined]
    assert n_threads != THREADS
    for mass in (None, 0.7):
        read = SparqRead(r=32, min_k=64, alpha_floor=0.0, mass=mass)
        torch.testing.assert_close(
            world.decode(other, read=read), world.decode(run, read=read), **tolerances.OUT[case.dtype]
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_k": 9}, "tokens read"),
        ({"r": 15}, "a better token|off by"),
        ({"alpha_floor": 0.9}, "off by"),
        ({"mass": 0.3}, r"what is read holds 0\."),
        ({"mass": 0.6}, r"0\.\d+ were enough"),
    ],
)
def test_a_wrong_answer_is_refused(wrong: dict[str, float], message: str) -> None:
    """Guard of this file's own check."""
    case, read = Case(lens=(60,)), SparqRead(r=16, min_k=10, local=0, alpha_floor=0.0)

    def run(*args: object, **kwargs: object) -> None:
        asked = kwargs.pop("read")
        floor = max(asked.alpha_floor, wrong.get("alpha_floor", 0.0))  # type: ignore[attr-defined]
        reference(*args, **kwargs, read=replace(asked, **{**wrong, "alpha_floor": floor}))  # type: ignore[arg-type]

    if "mass" in wrong:
        read = replace(read, min_k=40, mass=0.45)
    assert_right(reference, case, case.tokens(), read)
    with pytest.raises(AssertionError, match=message):
        assert_right(run, case, case.tokens(), read)
