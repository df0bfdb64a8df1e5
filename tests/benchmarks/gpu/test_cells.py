"""What the cells measure is what a CUDA engine runs; no GPU, and no kernel is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from vllm_sparq.attention_backends import engine
from vllm_sparq.benchmarks.gpu import cells, gpu_check, layer
from vllm_sparq.benchmarks.gpu.cases import Case
from vllm_sparq.benchmarks.gpu.cells import LAYER, TABLE_TOKENS, Cell
from vllm_sparq.config import Options, parse_options
from vllm_sparq.ops.sparq_decode.triton import score_kernel
from vllm_sparq.reads import HeadShape, SparqRead

HEADS = HeadShape(head_size=128, n_heads=32, n_kv_heads=8)
DENSE_FORMATS = [name for name in cells.FORMATS if name != "model"]
STATISTICS = ("mean", "tracked")
"""Of pages whose read needs each head's scores, so that no tile goes without masks."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine resolves on CUDA."""
    monkeypatch.setattr(engine.current_platform, "is_cuda", lambda: True, raising=False)


def resolved(options: Options) -> tuple[Any, Any]:
    """Read and pages of a layer, as an engine has them whose requests may be as long as our tables."""
    options = engine.on_platform(options)
    block_size = engine.preferred_block_size(options, TABLE_TOKENS)
    return options.read_of(HEADS), engine.page_layout(options, HEADS, block_size, torch.bfloat16)


@pytest.mark.usefixtures("cuda")
def test_the_timed_layer_is_that_of_a_cuda_engine() -> None:
    read, layout = resolved(Options())
    assert (LAYER.read, LAYER.layout) == (read, layout)
    assert read.dense_below == 16384
    assert (read.alpha_floor, layout.value_sum, layout.block_size) == (1.0, False, 256)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("format", DENSE_FORMATS)
def test_so_are_the_layers_of_formats(format: str) -> None:
    """K of a format that ranks tokens itself leaves fewer bytes for the tokens that are read."""
    case = cells.named(format)
    assert (case.read, case.layout) == resolved(Options(format=format))


@pytest.mark.usefixtures("cuda")
def test_so_is_quests() -> None:
    case = cells.named("model+bounds")
    assert (case.read, case.layout) == resolved(parse_options({}, "quest"))


def scores_of(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The compile-time arguments of each launch of the score kernel that a cell makes; nothing is launched."""
    found: list[dict[str, Any]] = []

    def run(kernel: Any, *args: Any, **named: Any) -> None:
        if kernel.fn.__name__ == "score_kernel":
            found.append(named)

    monkeypatch.setattr(type(score_kernel), "run", run)
    layer.launch(cell, "meta")
    return found


def is_plain(named: dict[str, Any]) -> bool:
    """Whether full pages whose tokens are all ranked are scored without masks."""
    marked = named["STATISTICS"] or named["POSITIONS"] or named["PROBS"]
    return not marked and named["N"] // named["RUNS"] % named["SLOTS"] == 0


def timed() -> list[Cell]:
    """Cells in which SparQ reads."""
    return [c for c in cells.all_cells() if c.kind in ("decode", "kernels") and isinstance(c.case.read, SparqRead)]


def test_timed_cells_run_the_variant_that_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of pages that are all default, and of formats; those named otherwise do not."""
    plain = {}
    for cell in {cell.case: cell for cell in timed()}.values():
        launches = scores_of(cell, monkeypatch)
        assert launches, cell.name
        plain[cell.name.split("/")[1]] = all(is_plain(named) for named in launches)
    wanted = {pages: pages.rpartition("+")[2] not in STATISTICS for pages in plain}
    assert plain == wanted
    assert {"model", "model+sparse", "model+mean", *DENSE_FORMATS} <= plain.keys()


def test_timed_cells_read_sparsely() -> None:
    """But for one, which is too short to gain; where an engine would begin to read sparsely is among them."""
    dense = {cell.name for cell in timed() if cell.case.read.is_dense(cell.context)}
    assert dense == {"decode/model/b256s512"}
    names = {cell.name for cell in timed()}
    assert {f"decode/model+sparse/b{b}s{s}k" for b in (1, 16) for s in (4, 8, 16, 32)} <= names


def test_a_check_runs_the_default_plan_beside_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among requests that are read densely and sparsely."""
    for name, kind in (("default", "model"), ("default+int4", "int4"), ("default+kivi4", "kivi4")):
        case = cells.CHECKS[name]
        assert (case.read, case.layout) == (cells.named(kind).read, cells.named(kind).layout)
        assert {case.read.is_dense(context) for context in case.lens} == {True, False}
        cell = Cell(name="decode/x", kind="decode", seconds=1.0, case=case, context=max(case.lens))
        assert all(is_plain(named) for named in scores_of(cell, monkeypatch))
    assert next(iter(cells.all_cells())).name == "check/default"
    floors = [case.read.alpha_floor for case in cells.CHECKS.values() if isinstance(case.read, SparqRead)]
    assert {0.0, 0.5, 1.0} <= set(floors)


def test_a_captured_step_reads_sparsely() -> None:
    for cell in cells.selected(cells.all_cells(), ["graph"]):
        assert {cell.case.read.is_dense(context) for context in cell.case.lens} == {True, False}


def test_a_step_resolves_no_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host takes for one would be that of pydantic, not of the launches."""
    small = Case(heads=2, kv_heads=1, head_size=16, block_size=16, dtype="float32", dense_below=32)
    cell = Cell(name="decode/x", kind="decode", seconds=1.0, case=small, context=80, table_tokens=96)
    steps = layer.decode_steps(layer.filled(cell, "cpu"))
    monkeypatch.setattr(Case, "options", property(lambda case: pytest.fail("resolved in a step")))
    for step in steps.values():
        step()


def test_a_record_says_what_was_read() -> None:
    """In numbers; what is zero is said, too."""
    said = gpu_check.describe(cells.decode("model", 16, 32768))
    assert said["read"]["dense_below"] == 16384
    assert (said["read"]["r"], said["read"]["k_per_token"], said["read"]["alpha_floor"]) == (16, "7/64", 1.0)
    sparse = gpu_check.describe(cells.decode("model+sparse", 1, 4096))
    assert (sparse["case"]["dense_below"], sparse["read"]["dense_below"]) == (0, 0)
    assert "far_bytes" not in gpu_check.describe(replace(cells.decode("model", 1, 4096)))["case"]
