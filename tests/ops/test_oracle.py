"""SparQ's reference against an independent oracle (`tests.ops.oracle`), and both against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ops.cases import Case, Tokens, build
from tests.ops.oracle import Array, expected, paper, repository
from vllm_sparq.ops.sparq_decode.reference import sparq_decode as reference
from vllm_sparq.reads import SparqRead


def check(case: Case, tokens: Tokens, read: SparqRead) -> None:
    case = replace(case, ranking="model", dtype=torch.float32)
    got = build(case, tokens).decode(reference, read=read)
    want = torch.from_numpy(expected(case, tokens, read)).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", ["logits", "probs"])
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "r", "min_k", "local"),
    [
        (1, 1, 16, 1, 1, 0),
        (2, 2, 64, 8, 8, None),
        (4, 1, 64, 16, 20, 3),
        (6, 2, 80, 7, 13, 0),
        (8, 1, 128, 128, 30, 30),
        (3, 1, 96, 33, 5, 100),  # a local window larger than k is k
    ],
)
def test_random(
    heads: int, kv_heads: int, head_size: int, r: int, min_k: int, local: int | None, floor: float, reduce: str
) -> None:
    case = Case(heads=heads, kv_heads=kv_heads, head_size=head_size, lens=(1, 2, 0, 16, 17, 47, 48, 100, 161))
    read = SparqRead(r=r, min_k=min_k, local=local, alpha_floor=floor, group_reduce=reduce)  # type: ignore[arg-type]
    check(case, case.tokens(), read)


@pytest.mark.parametrize("reduce", ["logits", "probs"])
@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize(("mass", "least_k"), [(0.05, 1), (0.3, 4), (0.6, 1), (0.9, 12), (0.999, 1), (0.01, 1000)])
def test_as_few_as_hold_the_mass(mass: float, least_k: int, floor: float, reduce: str) -> None:
    case = Case(heads=4, kv_heads=2, lens=(1, 0, 47, 48, 100, 161))
    read = SparqRead(r=16, min_k=40, local=3, alpha_floor=floor, group_reduce=reduce, mass=mass, least_k=least_k)  # type: ignore[arg-type]
    check(case, case.tokens(), read)


@pytest.mark.parametrize("dense_below", [0, 17, 100, 1000])
@pytest.mark.parametrize("slope", [Fraction(0), Fraction(1, 16), Fraction(1, 3)])
def test_context_decides(dense_below: int, slope: Fraction) -> None:
    case = Case(lens=(16, 17, 99, 100, 161))
    check(case, case.tokens(), SparqRead(r=8, min_k=6, k_per_token=slope, alpha_floor=0.0, dense_below=dense_below))


ADVERSARIAL = (
    "zero query",
    "a zero head",
    "one channel",
    "equal channels",
    "head off the channels",
    "equal keys",
    "huge logits",
    "all negative",
    "newest are worst",
    "pairs of equal keys",
)


@pytest.mark.parametrize("reduce", ["logits", "probs"])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial(kind: str, reduce: str) -> None:
    case = Case(heads=4, kv_heads=2, head_size=64, lens=(10, 33, 48, 65))
    tokens = case.tokens()
    for query, key in zip(tokens.query, tokens.key, strict=True):
        if kind == "zero query":
            query[:] = 0
        elif kind == "a zero head":
            query[:, 1] = 0
        elif kind == "one channel":
            query[..., 1:] = 0
        elif kind == "equal channels":  # the lowest win
            query[:] = query.sign() * 0.5
        elif kind == "head off the channels":
            query[:, 0, :32] = 0
            size = 100 if reduce == "logits" else 4  # see "huge logits"
            query[:, 1, :16], query[:, 1, 16:] = size * query[:, 1, :16].sign(), 0
        elif kind == "equal keys":  # the oldest win
            key[:] = key[:1].clone()
        elif kind == "huge logits":
            query *= 300 if reduce == "logits" else 10  # beyond, probabilities underflow in fp32 and tie at 0
        elif kind == "all negative":
            query[:], key[:] = query.abs(), -key.abs() - 3
        elif kind == "newest are worst":
            query[:] = query.abs()
            key[-12:] = -20
        else:
            key[1::2] = key[: len(key) - 1 : 2].clone()
    check(case, tokens, SparqRead(r=8, min_k=8, local=2, alpha_floor=0.0, group_reduce=reduce))  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (8, 2), (3, 1)])
@pytest.mark.parametrize(("r", "k"), [(1, 2), (8, 9), (64, 20)])
def test_group_reduce_probs_is_the_paper(heads: int, kv_heads: int, r: int, k: int) -> None:
    """Where the current token is among the best, as in practice, so that forcing it in changes nothing."""
    case = Case(heads=heads, kv_heads=kv_heads, ranking="model", lens=(40, 65))
    tokens, group = case.tokens(), heads // kv_heads
    read = SparqRead(r=r, min_k=k - 1, local=0, alpha_floor=0.0, group_reduce="probs")
    want = torch.empty(2, heads, case.head_size)
    for b, (query, key, value) in enumerate(zip(tokens.query, tokens.key, tokens.value, strict=True)):
        for g, q in enumerate(query[0].split(group)):  # along the strongest head of each channel
            key[-1, g] = 10 * q.gather(0, q.abs().argmax(0, keepdim=True))[0].sign()
        for g in range(kv_heads):
            one = slice(g * group, (g + 1) * group)
            arrays = (query[0, one], key[:, g], value[:, g])
            want[b, one] = torch.from_numpy(paper(*(x.double().numpy() for x in arrays), r=r, k=k))
    torch.testing.assert_close(build(case, tokens).decode(reference, read=read), want, rtol=1e-5, atol=1e-5)


def by_hand(query: Array, keys: Array, values: Array, read: SparqRead) -> Array:
    """The reference on one request and one group, D = 16: query [H', 16], keys and values [S, 16]."""
    case = Case(heads=len(query), kv_heads=1, head_size=16, ranking="model", lens=(len(keys),))
    tensors = (torch.from_numpy(x).float() for x in (query, keys, values))
    query_t, key_t, value_t = tensors
    tokens = Tokens([query_t[None]], [key_t[:, None]], [value_t[:, None]])
    return build(case, tokens).decode(reference, read=read)[0].numpy()


def test_by_hand() -> None:
    # D = 16, scale = 1/4, q = (2, 2, 2, 2, 0, ..), r = 1: channels tie, so channel 0. It holds 2 of |q| = 8, so the
    # temperature is sqrt(8 / 2) = 2 and a score is 2 * 1/4 * 2 * K[0] = K[0]. K[0] is ln 4, ln 3, ln 2, ln 1, of which
    # softmax makes 0.4, 0.3, 0.2, 0.1.
    # k = 1, local = 0: the current token 3 and the best other, token 0. alpha = 0.1 + 0.4 = 0.5.
    # Exact logits are 1/4 * 2 * (K[0] + K[1]): with K[1] = ln(9/4) that of token 0 is 1/2 * ln 9 = ln 3; token 3 has 0.
    # Weights 3/4 and 1/4. V is 4, 0, 0, 12: exact part 3 + 3 = 6, mean 4, out = 0.5 * 6 + 0.5 * 4 = 5.
    query, keys = np.zeros((1, 16)), np.zeros((4, 16))
    query[0, :4] = 2
    keys[:, 0] = np.log([4, 3, 2, 1])
    keys[0, 1] = np.log(9 / 4)
    values = np.repeat([[4.0], [0.0], [0.0], [12.0]], 16, axis=1)
    read = SparqRead(r=1, min_k=1, local=0, alpha_floor=0.0)
    np.testing.assert_allclose(by_hand(query, keys, values, read), 5, rtol=1e-6)
    # A floor of 3/4 binds: 0.75 * 6 + 0.25 * 4 = 5.5. A floor of 1/4 does not. With 1 the mean is out: 6.
    for floor, out in [(0.75, 5.5), (0.25, 5), (1.0, 6)]:
        np.testing.assert_allclose(by_hand(query, keys, values, replace(read, alpha_floor=floor)), out, rtol=1e-6)
    # local = 1 of k = 1: tokens 2 and 3 whatever their rank. alpha = 0.2 + 0.1 = 0.3. Exact logits 1/2 ln 2 and 0:
    # weights w and 1 - w with w = sqrt 2 / (1 + sqrt 2); exact part 12 (1 - w) = 12 / (1 + sqrt 2); mean 4.
    # out = 3.6 / (1 + sqrt 2) + 2.8.
    out = by_hand(query, keys, values, replace(read, local=1))
    np.testing.assert_allclose(out, 3.6 / (1 + 2**0.5) + 2.8, rtol=1e-6)
    np.testing.assert_allclose(
        repository(query, keys, keys, values, r=1, n_selected=2, n_local=1, scale=0.25).out, 5, rtol=1e-12
    )


def test_by_hand_group() -> None:
    # Two heads, D = 16, scale 1/4, r = 1. q_0 = 8 in channel 0; q_1 = 4 in channel 0 and 5 in channel 1. Sums of |q|:
    # 12 and 5, so channel 0 (each head of its own would take 0 and 1). Temperatures 1 and sqrt(9 / 4) = 3/2, so scores
    # are 1/4 * 8 * K[0] = 2 K[0] and 3/2 * 1/4 * 4 * K[0] = 3/2 K[0].
    # K[0] = 0, ln 2, 0: scores 0, 2 ln 2, 0 and 0, 1.5 ln 2, 0. Token 1 joins the current token 2 (k = 1, local = 0).
    # alpha_0 = (4 + 1) / 6, alpha_1 = (w + 1) / (w + 2) with w = 2^1.5.
    # Exact logits: head 0 has 2 ln 2 and 0: weights 4/5, 1/5; head 1 has ln 2 and 0 (K[1] = 0): 2/3, 1/3.
    # V = 12, 15, 30: exact 18 and 20, mean 19. out_0 = 5/6 * 18 + 1/6 * 19, out_1 = alpha_1 * 20 + (1 - alpha_1) * 19.
    query, keys = np.zeros((2, 16)), np.zeros((3, 16))
    query[0, 0], query[1, 0], query[1, 1] = 8, 4, 5
    keys[1, 0] = np.log(2)
    values = np.repeat([[12.0], [15.0], [30.0]], 16, axis=1)
    out = by_hand(query, keys, values, SparqRead(r=1, min_k=1, local=0, alpha_floor=0.0))
    alpha = (2**1.5 + 1) / (2**1.5 + 2)
    np.testing.assert_allclose(out[0], 5 / 6 * 18 + 19 / 6, rtol=1e-6)
    np.testing.assert_allclose(out[1], alpha * 20 + (1 - alpha) * 19, rtol=1e-6)


def test_by_hand_logits_and_probs_choose_differently() -> None:
    # Two heads on a channel each, r = 2, all of |q| covered: scores 1/4 * 4 * K = K[0] and K[1].
    # Token 0 has 10 and -10, sum 0; token 1 has 1 and 1, sum 2; the current token 2 has 0 and 0.
    # By logits token 1 is chosen (2 > 0), by probabilities token 0 (about 1 + 0 against about e^-9 + 0.73).
    query, keys = np.zeros((2, 16)), np.zeros((3, 16))
    query[0, 0] = query[1, 1] = 4
    keys[0, :2], keys[1, :2] = (10, -10), (1, 1)
    values = np.repeat([[100.0], [200.0], [0.0]], 16, axis=1)
    read = SparqRead(r=2, min_k=1, local=0, alpha_floor=1.0)
    share = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(by_hand(query, keys, values, read), 200 * share, rtol=1e-6)
    out = by_hand(query, keys, values, replace(read, group_reduce="probs"))
    np.testing.assert_allclose(out[0], 100 / (1 + np.exp(-10)), rtol=1e-6)
    np.testing.assert_allclose(out[1], 100 / (1 + np.exp(10)), rtol=1e-4)
