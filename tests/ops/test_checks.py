"""Every contract refuses what does not fit before it touches anything; messages name argument, rule and value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.ops.cases import Case, build
from vllm_sparq.ops import dense_decode as dense_decode_contract
from vllm_sparq.ops import dispatch
from vllm_sparq.ops import prefill as prefill_contract
from vllm_sparq.ops import quest_decode as quest_decode_contract
from vllm_sparq.ops import sparq_decode as sparq_decode_contract
from vllm_sparq.ops import write as write_contract
from vllm_sparq.reads import SpansRead, SparqRead

CONTRACTS = {
    "write": write_contract.write,
    "dense_decode": dense_decode_contract.dense_decode,
    "sparq_decode": sparq_decode_contract.sparq_decode,
    "quest_decode": quest_decode_contract.quest_decode,
    "prefill": prefill_contract.prefill,
}
DECODES = ("dense_decode", "sparq_decode", "quest_decode")
TOKENS = ("write", "prefill")
READ = SparqRead(r=8, min_k=4, alpha_floor=0.0)
READS = {"sparq_decode": dict(read=READ), "quest_decode": dict(read=SpansRead(min_k=16))}
CASE = Case(heads=4, kv_heads=2, head_size=64, lens=(20, 33), new=(5, 1))


def arguments(op: str, case: Case = CASE) -> dict[str, Any]:
    """Valid arguments of the contract of ``op``, by name. T is 9 (3 rows of padding), B is 2."""
    if op == "quest_decode" and case is CASE:
        case = replace(case, ranking="bounds", value_sum=False)
    world = build(case, written="context") if op in TOKENS else build(replace(case, new=()))
    given: dict[str, Any] = dict(pages=world.pages, block_table=world.block_table)
    if op == "write":
        given |= dict(key=world.key, value=world.value)
        return given | dict(query_start_loc=world.query_start_loc, seq_lens=world.seq_lens)
    given |= dict(scale=case.scale)
    if op == "prefill":
        given |= dict(query=world.query, key=world.key, value=world.value, out=world.empty_out(len(world.query)))
        return given | dict(query_start_loc=world.query_start_loc, context_lens=world.context_lens)
    given |= dict(query=world.query[:2], seq_lens=world.seq_lens, out=world.empty_out())
    return given | READS.get(op, {})


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.OVERRIDE, "reference")


@pytest.mark.parametrize("op", CONTRACTS)
def test_valid_arguments_are_taken(op: str) -> None:
    given = arguments(op)
    CONTRACTS[op](**given)
    if "out" in given:
        assert given["out"][:2].isfinite().all()


def wrong(ops: tuple[str, ...], name: str, change: Callable[[Any], Any], message: str, id: str) -> list[object]:
    return [pytest.param(op, name, change, message, id=f"{op}-{name}-{id}") for op in ops]


BAD = [
    row
    for name, ops, heads in [
        ("query", (*DECODES, "prefill"), "a multiple of 2"),
        ("out", (*DECODES, "prefill"), "a multiple of 2"),
        ("key", TOKENS, "2"),
        ("value", TOKENS, "2"),
    ]
    for row in [
        *wrong(ops, name, lambda t: t[:, :1], rf"{name} must be .* heads {heads}, got shape \(\d, 1, 64\)", "heads"),
        *wrong(ops, name, lambda t: t[..., :48], rf"{name} must be \[rows, heads, 64\].*got shape .*48\)", "head_size"),
        *wrong(ops, name, lambda t: t[0], rf"{name} must be \[rows, heads, 64\].*got shape \(\d, 64\)", "dimensions"),
        *wrong(ops, name, lambda t: t.bfloat16(), rf"{name} must be torch.float32 as .* got torch.bfloat16", "dtype"),
        *wrong(
            ops,
            name,
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            rf"{name} must be dense in its last dimension, got strides \(\d+, \d+, 2\)",
            "stride",
        ),
    ]
] + [
    *wrong(
        (*DECODES, "prefill"), "out", lambda t: t[:1], r"out must be \(\d, 4, 64\) like query, got \(1, 4, 64\)", "rows"
    ),
    *wrong(
        ("write",), "value", lambda t: t[:1], r"key \(9, 2, 64\) and value \(1, 2, 64\) must have one shape", "rows"
    ),
    *wrong(
        tuple(CONTRACTS), "block_table", lambda t: t.long(), r"block_table must be int32 .* got torch.int64", "dtype"
    ),
    *wrong(
        tuple(CONTRACTS), "block_table", lambda t: t[0], r"block_table must be int32 \[B, M\].*got .*\(\d+,\)", "flat"
    ),
    *wrong(tuple(CONTRACTS), "block_table", lambda t: t.T, r"block_table must be .* dense rows", "stride"),
    *wrong(tuple(CONTRACTS), "block_table", lambda t: t[:1], r"block_table has 1 rows for 2 requests", "rows"),
    *[
        row
        for name, ops in [("seq_lens", (*DECODES, "write")), ("context_lens", ("prefill",))]
        for row in [
            *wrong(ops, name, lambda t: t.long(), rf"{name} must be a dense int32 vector, got torch.int64", "dtype"),
            *wrong(ops, name, lambda t: t[None], rf"{name} must be a dense int32 vector, got .*\(1, 4\)", "dimensions"),
            *wrong(ops, name, lambda t: t.repeat_interleave(2)[::2], rf"{name} must be a dense int32 vector", "stride"),
            *wrong(ops, name, lambda t: t[:1], rf"{name} has 1 entries for 2 requests", "rows"),
        ]
    ],
    *wrong(TOKENS, "query_start_loc", lambda t: t.long(), r"query_start_loc must be .*int32.*torch.int64", "dtype"),
    *wrong(TOKENS, "query_start_loc", lambda t: t[None], r"query_start_loc must be .*\(1, 3\)", "dimensions"),
    *wrong(
        TOKENS, "query_start_loc", lambda t: t.repeat_interleave(2)[::2], r"query_start_loc must be .*dense", "stride"
    ),
    *wrong(("sparq_decode",), "read", lambda r: replace(r, r=0), r"r=0 must be 1 to the head size 64", "zero"),
    *wrong(("sparq_decode",), "read", lambda r: replace(r, r=65), r"r=65 must be 1 to the head size 64", "large"),
    *wrong(("sparq_decode",), "read", lambda r: replace(r, mass=1.0), r"mass=1.0 must be above 0 and below 1", "all"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), BAD)
def test_what_does_not_fit_is_refused(op: str, name: str, change: Callable[[Any], Any], message: str) -> None:
    given = arguments(op)
    given[name] = change(given[name])
    if name == "query" and "out" in given and given[name].dim() == 3:
        given["out"] = given["out"][: len(given[name])]
    before = given["pages"].data.clone()
    with pytest.raises(ValueError, match=message) as error:
        CONTRACTS[op](**given)
    assert re.match(r"\w+", str(error.value))
    assert given["pages"].data.equal(before)
    if "out" in given and name != "out":
        assert given["out"].isnan().all()


def test_prefill_wants_key_and_value_alike() -> None:
    for name in ("key", "value"):
        given = arguments("prefill")
        given[name] = given[name][:1]
        with pytest.raises(ValueError, match=r"(key|value) .*\(1, 2, 64\)"):
            CONTRACTS["prefill"](**given)


def test_sparq_decode_wants_a_scoring_copy() -> None:
    with pytest.raises(ValueError, match="needs pages with a ranking copy of K; this layout has none"):
        CONTRACTS["sparq_decode"](**arguments("sparq_decode", replace(CASE, ranking=None)))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(CASE, ranking=None), "needs pages with ranking 'bounds'; this layout has None"),
        (replace(CASE, ranking="int4"), "needs pages with ranking 'bounds'; this layout has 'int4'"),
        (
            replace(CASE, ranking="bounds", positions=True),
            "needs pages that keep all tokens; this layout has positions",
        ),
    ],
)
def test_quest_decode_wants_bounds_of_neighbours(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONTRACTS["quest_decode"](**arguments("quest_decode", case))


def test_sparq_decode_does_not_take_bounds_for_a_copy() -> None:
    with pytest.raises(ValueError, match="needs pages with a ranking copy of K; this layout has none"):
        CONTRACTS["sparq_decode"](**arguments("sparq_decode", replace(CASE, ranking="bounds")))


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.999])
def test_the_mean_value_wants_sums(floor: float) -> None:
    given = arguments("sparq_decode", replace(CASE, value_sum=False))
    given["read"] = replace(READ, alpha_floor=floor)
    with pytest.raises(ValueError, match=rf"alpha_floor={floor} needs pages with value sums; this layout has none"):
        CONTRACTS["sparq_decode"](**given)
    given["read"] = replace(READ, alpha_floor=1.0)
    CONTRACTS["sparq_decode"](**given)
