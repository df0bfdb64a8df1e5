"""The checks of `gpu_check.py`, in Triton's interpreter: they pass, and a kernel that is wrong fails them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from vllm_sparq.benchmarks.gpu import cases
from vllm_sparq.benchmarks.gpu.cases import Case, build, load
from vllm_sparq.benchmarks.gpu.checks import check_graph, run_checks

LAYER = Case(heads=2, kv_heads=1, head_size=16, block_size=16, dtype="float32", alpha_floor=0.0, dense_below=32)
SMALL = replace(LAYER, lens=(0, 17, 100))
CASES = {
    "model, far, a sink": replace(SMALL, keys="sink", far_bytes=100_000),
    "int8, all equal": replace(SMALL, keys="equal", format="int8", lens=(100,)),
    "tracked": replace(SMALL, tracked=True, lens=(16, 210)),
}


def again(step: Callable[[], object]) -> Callable[[], object]:
    """What a graph would do, without one."""
    step()
    return step


def wrong(records: Any) -> list[str]:
    found = list(records)
    assert len(found) >= 6
    return [record["check"] for record in found if not record["error"] <= record["limit"]]


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_answer_as_the_reference(name: str) -> None:
    assert wrong(run_checks(CASES[name], "cpu")) == []


def test_pages_are_far_away() -> None:
    world = build(CASES["model, far, a sink"], "cpu", far=True)
    first = int(world.table[world.table < len(world.pages.data)].min())
    assert first * world.pages.data[0].nbytes >= 100_000
    assert world.own.data.data_ptr() - world.pages.data.data_ptr() >= 100_000
    assert len(world.own.data) == len(build(SMALL, "cpu").pages.data)


def test_a_graph_follows_its_tensors() -> None:
    assert wrong(check_graph(replace(SMALL, lens=(0, 17, 40)), "cpu", again)) == []


def test_a_graph_that_keeps_a_table_is_found() -> None:
    """What a kernel wrapper that copied a table would do."""

    def frozen(step: Callable[[], object]) -> Callable[[], object]:
        step()
        return lambda: None

    found = wrong(check_graph(replace(SMALL, lens=(0, 17, 40)), "cpu", frozen))
    assert {"sparq_decode in a graph", "dense_decode in a graph, pages moved"} <= set(found)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that mistakes the scale."""

    def mistaken(op: str, implementation: str) -> Callable[..., None]:
        run = load(op, implementation)
        if (op, implementation) != ("dense_decode", "triton"):
            return run
        return lambda *tensors, scale, **named: run(*tensors, scale=1.1 * scale, **named)

    monkeypatch.setattr(cases, "load", mistaken)
    assert wrong(run_checks(replace(SMALL, lens=(0, 40)), "cpu")) == ["dense_decode"]
