"""`sparq_decode` with a mass: as few of the k tokens as hold it, and the output that follows from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, Case, build, each, load
from tests.ops.cases import device_of as device
from tests.ops.shapes import FORMATS, SHAPES, TINY, TINY_FORMATS
from tests.ops.sparq_checks import assert_right, tokens_read
from tests.ops.test_oracle import by_hand
from tests.ops.test_sparq_decode import LONG, LONG_FORMATS, exact_tokens, ranked
from vllm_sparq.reads import SparqRead

MASSES = (
    dict(mass=0.5),
    dict(mass=0.9, local=1, group_reduce="probs"),
    dict(mass=0.97, least_k=9, alpha_floor=1.0),
    dict(mass=0.2, local=0, alpha_floor=1.0, group_reduce="probs"),
)
MASS_CASES = (*SHAPES[:6], *LONG, replace(ranked(FORMATS[-1]), lens=(97, 300)), LONG_FORMATS[2])
MASS_TINY = (TINY[0], replace(TINY[1], lens=(0, 40)), replace(TINY_FORMATS[0], lens=(16, 0, 33)))


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "case"), each(MASS_CASES, tiny=MASS_TINY))
@pytest.mark.parametrize("turn", range(len(MASSES)))
def test_as_few_as_hold_the_mass(implementation: str, case: Case, turn: int) -> None:
    """The reference too, which over codes reads what the oracle does."""
    read = SparqRead(**dict(r=case.head_size // 2, min_k=max(case.lens) // 2, alpha_floor=0.0) | MASSES[turn])  # type: ignore[arg-type]
    run, codes = load("sparq_decode", implementation), case.format != "model"
    given, triton = (run, case, case.tokens(), read, device(implementation)), implementation == "triton"
    assert_right(*given, rounds=triton and codes, probes=implementation != "reference" or not codes)


@pytest.mark.parametrize(("implementation", "reduce"), each(["logits", "probs"], tiny=["logits"]))
def test_a_cut_context_holds_the_mass(implementation: str, reduce: str) -> None:
    """One row and more tokens than any implementation gives to one thread or program."""
    case = Case(heads=2, kv_heads=1, head_size=256, block_size=128, lens=(1100,))
    read = SparqRead(r=64, min_k=500, local=9, alpha_floor=0.1, group_reduce=reduce, mass=0.6)  # type: ignore[arg-type]
    assert_right(load("sparq_decode", implementation), case, case.tokens(), read, device(implementation))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("reduce", ["logits", "probs"])
def test_nearly_all_of_the_mass_is_all_of_k(implementation: str, reduce: str) -> None:
    """What k tokens do not hold, no fewer do: the same tokens in the same order, so nearly the same answer."""
    case, on = Case(heads=4, kv_heads=2, lens=(65, 40), dtype=torch.bfloat16), device(implementation)
    read = SparqRead(r=16, min_k=8, alpha_floor=0.0, group_reduce=reduce)  # type: ignore[arg-type]
    run, world = load("sparq_decode", implementation), build(case, device=on)
    limit, plain = (world.decode(run, read=replace(read, mass=mass)) for mass in (1 - 2.0**-20, None))
    torch.testing.assert_close(limit, plain, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
def test_peaked_attention_reads_fewer(implementation: str) -> None:
    """Exact numbers, with room: of 100 tokens, k = 40, two of which are the newest; equal keys hold 1/100 each.

    One token along the query holds nearly all, so it and the newest are read, or as many as are the least; of equal
    ones 25 hold 0.245, the oldest first, and 41 are the most.
    """
    case = Case(heads=2, kv_heads=1, ranking="model", lens=(100,))
    on, run = device(implementation), load("sparq_decode", implementation)
    read = SparqRead(r=16, min_k=40, local=1, alpha_floor=1.0)
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    keys = torch.zeros(100, 1, 64)
    keys[50, 0] = 8 * signs  # the temperature of 16 channels is 2, so its score is 2 / 8 * 16 * 8 = 32, the others' 0
    flat, peaked = torch.zeros(100, 1, 64), keys
    for key, mass, least_k, want in [
        (peaked, 0.9, 1, [50, 98, 99]),
        (peaked, 0.9, 6, [*range(4), 50, 98, 99]),
        (flat, 0.245, 1, [*range(23), 98, 99]),
        (flat, 0.9, 1, [*range(39), 98, 99]),
        (flat, 0.015, 1, [98, 99]),
    ]:
        tokens = exact_tokens(case, 100, key, torch.zeros(100, 1, 64))
        adaptive = replace(read, mass=mass, least_k=least_k)
        assert tokens_read(run, build(case, tokens, device=on), adaptive)[0, 0].tolist() == want


def test_by_hand_mass() -> None:
    # q = (2, 2, 2, 2, 0, ..) and r = 4, so the scores are the exact logits: 1/4 * 2 * K[0] = ln 4, ln 3, ln 2, ln 1,
    # of which softmax makes 0.4, 0.3, 0.2, 0.1. The current token 3 comes first (0.1), then tokens 0 (0.5 together), 1
    # (0.8) and 2. V is 10, 20, 30, 40: the exact parts of one to three tokens are 40, (0.4 * 10 + 0.1 * 40) / 0.5 = 16
    # and (4 + 6 + 4) / 0.8 = 17.5. k = 2, so three tokens are the most.
    query, keys = np.zeros((1, 16)), np.zeros((4, 16))
    query[0, :4] = 2
    keys[:, 0] = 2 * np.log([4, 3, 2, 1])
    values = np.repeat([[10.0], [20.0], [30.0], [40.0]], 16, axis=1)
    read = SparqRead(r=4, min_k=2, local=0, alpha_floor=1.0)
    for mass, least_k, want in [
        (None, 1, 17.5),
        (0.05, 1, 16.0),  # the current token holds it, and one more is the least
        (0.49, 1, 16.0),
        (0.51, 1, 17.5),
        (0.79, 1, 17.5),
        (0.95, 1, 17.5),  # three are the most
        (0.05, 2, 17.5),
        (0.05, 9, 17.5),  # the least is no more than the most
    ]:
        out = by_hand(query, keys, values, replace(read, mass=mass, least_k=least_k))
        np.testing.assert_allclose(out, want, rtol=1e-6)
    # alpha is what is read: 0.5 of 16 and 0.5 of the mean, 25.
    out = by_hand(query, keys, values, replace(read, mass=0.49, alpha_floor=0.0))
    np.testing.assert_allclose(out, 20.5, rtol=1e-6)
    # The newest are read whatever they hold: tokens 2 and 3, (0.2 * 30 + 0.1 * 40) / 0.3.
    out = by_hand(query, keys, values, replace(read, mass=0.05, local=1))
    np.testing.assert_allclose(out, 100 / 3, rtol=1e-6)
