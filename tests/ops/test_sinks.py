"""Sinks, one more logit a head: once per row however it is cut, in what tokens are ranked by too; and extreme ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, KERNELS, Case, build, each, load
from tests.ops.cases import device_of as device
from tests.ops.test_attention import BEFORE, scored, scores_of, with_scores
from tests.ops.test_checks import CONTRACTS, DECODES, arguments
from tests.ops.test_oracle import check
from vllm_sparq.reads import SpansRead, SparqRead

CUT = Case(heads=3, kv_heads=1, lens=(600,), sinks=True)
"""So long that every implementation cuts it."""

OPS: dict[str, dict[str, Any]] = {
    "dense": {"op": "dense_decode"},
    "mean": {"op": "sparq_decode", "read": SparqRead(r=16, min_k=300, alpha_floor=0.0)},
    "mass": {"op": "sparq_decode", "read": SparqRead(r=16, min_k=300, alpha_floor=0.25, mass=0.9)},
    "probs": {"op": "sparq_decode", "read": SparqRead(r=16, min_k=300, alpha_floor=1.0, group_reduce="probs")},
    "spans": {"op": "quest_decode", "read": SpansRead(min_k=320)},
}


def decoded(case: Case, implementation: str, *, op: str, **options: Any) -> torch.Tensor:
    if op == "quest_decode":
        case = replace(case, ranking="bounds", value_sum=False)
    return build(case, device=device(implementation)).decode(load(op, implementation), **options).cpu()


@pytest.mark.parametrize("reduce", ["logits", "probs"])
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mass", [None, 0.05, 0.6, 0.9])
@pytest.mark.parametrize("changes", [{"sinks": True}, {"soft_cap": 2.0}, {"sinks": True, "soft_cap": 5.0}], ids=str)
def test_the_reference_is_the_oracle(changes: dict[str, Any], mass: float | None, floor: float, reduce: str) -> None:
    """Some sinks far above all tokens, some far below; caps that many logits would exceed."""
    case = replace(Case(heads=10, kv_heads=2, lens=(1, 0, 16, 47, 48, 100, 161)), **changes)
    read = SparqRead(r=16, min_k=20, local=3, alpha_floor=floor, group_reduce=reduce, mass=mass, dense_below=20)  # type: ignore[arg-type]
    check(case, case.tokens(), read)


@pytest.mark.parametrize(("implementation", "name"), each(OPS, implementations=KERNELS))
def test_a_cut_context_has_its_sinks_once(implementation: str, name: str) -> None:
    got = decoded(CUT, implementation, **OPS[name])
    torch.testing.assert_close(got, decoded(CUT, "reference", **OPS[name]), **tolerances.OUT[CUT.dtype])


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_cut_prompt_has_its_sinks_once(implementation: str) -> None:
    case = Case(heads=2, kv_heads=1, block_size=256, lens=(2100,), new=(3,), sinks=True)
    got = build(case, device=device(implementation)).prefill(load("prefill", implementation))
    want = build(case).prefill(load("prefill", "reference"))
    torch.testing.assert_close(got.cpu(), want, **tolerances.OUT[case.dtype])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("op", ["dense_decode", "sparq_decode", "prefill"])
@pytest.mark.parametrize("soft_cap", [None, 2.5])
def test_no_token_gets_what_a_sink_takes(implementation: str, op: str, soft_cap: float | None) -> None:
    """The attention of a row's tokens adds up to one less the mean over the heads of what their sinks take."""
    n_rows = 2 if op == "prefill" else 1
    case = replace(scored(CUT), kv_heads=3, ranking="model", lens=(300,), new=(2,) if op == "prefill" else ())
    case = replace(case, soft_cap=soft_cap)
    tokens, world = case.tokens(), with_scores(case, device(implementation))
    if op == "prefill":
        world.prefill(load(op, implementation))
    else:  # all channels: approximate probabilities are exact
        read = {} if op == "dense_decode" else {"read": SparqRead(r=case.head_size, min_k=8)}
        world.decode(load(op, implementation), **read)
    query, key = tokens.query[0].double(), tokens.key[0].double()
    logits = case.scale * torch.einsum("tgd,sgd->gts", query, key)
    logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    visible = torch.ones(n_rows, 300, dtype=torch.bool).tril(300 - n_rows)
    weights = logits.masked_fill(~visible, -torch.inf).exp()
    sinks = case.sink_logits()
    assert sinks is not None
    held = 1 - sinks.double().exp()[:, None] / (weights.sum(-1) + sinks.double().exp()[:, None])  # [G, T']
    (scores,) = scores_of(world)
    got = (scores - BEFORE).sum(0).double()
    torch.testing.assert_close(got, held.sum(1), rtol=1e-4, atol=2e-4)
    assert held.min() < 0.9
    assert held.max() > 0.99


@pytest.mark.parametrize(("implementation", "name"), each(OPS, tiny=["mean"], implementations=ALL))
def test_extreme_sinks(implementation: str, name: str) -> None:
    """So low that nothing is left of them, and so high that nothing is left of the tokens."""
    case = replace(CUT, lens=(40,))
    options = dict(OPS[name])
    if "read" in options:
        options["read"] = replace(options["read"], min_k=20)
    if options["op"] == "quest_decode":
        options["read"], case = SpansRead(min_k=16), replace(case, lens=(100,), ranking="bounds", value_sum=False)
    run, world = load(options.pop("op"), implementation), build(case, device=device(implementation))
    out, without = world.empty_out(), world.empty_out()
    given = world.query[:1], world.pages, world.block_table, world.seq_lens
    sinks = torch.tensor([-1e30, 1e30, 1e4], device=out.device)
    run(*given, scale=case.scale, out=without, **options)
    run(*given, scale=case.scale, out=out, sinks=sinks, **options)
    torch.testing.assert_close(out[:, 1:], torch.zeros_like(out[:, 1:]))
    if name not in ("mass", "probs"):  # where the others' sinks say what is read
        torch.testing.assert_close(out[:, 0], without[:, 0])


@pytest.mark.parametrize("op", [*DECODES, "prefill"])
def test_a_soft_cap_of_nothing_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=r"soft_cap must be positive or None, got 0\.0"):
        CONTRACTS[op](**arguments(op), soft_cap=0.0)


@pytest.mark.parametrize("op", [*DECODES, "prefill"])
@pytest.mark.parametrize("change", ["dtype", "length"])
def test_sinks_that_do_not_fit_are_refused(op: str, change: str) -> None:
    sinks = torch.zeros(4, dtype=torch.bfloat16) if change == "dtype" else torch.zeros(3)
    with pytest.raises(ValueError, match="sinks must be a dense float32 vector of 4 entries, one per query head, got"):
        CONTRACTS[op](**arguments(op), sinks=sinks)
