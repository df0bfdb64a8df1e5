"""What the process of the GPU does with a cell, over interpreted kernels; clocks, graphs and memory are pretended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.benchmarks.gpu.test_checks import LAYER, again
from vllm_sparq.benchmarks.gpu import layer, timing, worker
from vllm_sparq.benchmarks.gpu.cells import Cell
from vllm_sparq.benchmarks.gpu.compiling import answer
from vllm_sparq.benchmarks.gpu.rivals import Attention, is_fatal, sdpa

STEP_US = {"dense": 8.0, "sparq": 2.0, "sdpa": 4.0, "prefill": 16.0}


def samples(runs: Mapping[str, Callable[[], object]], n_samples: int = 20) -> dict[str, list[float]]:
    """Each runs once, and takes what is made up."""
    for run in runs.values():
        run()
    return {name: [STEP_US.get(name, 1.0)] * n_samples for name in runs}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.GpuWorker:
    for name, pretended in (("capture", again), ("samples_us", samples), ("host_us", lambda step: 50.0)):
        monkeypatch.setattr(timing, name, pretended)
    monkeypatch.setattr(layer, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return worker.GpuWorker(tmp_path)


def cell(kind: Any, **more: Any) -> Cell:
    return Cell(name=f"{kind}/x", kind=kind, seconds=1.0, case=LAYER, table_tokens=160, **more)


def test_a_decode_step_is_timed_beside_what_is_installed(gpu: worker.GpuWorker) -> None:
    found = {record["method"]: record for record in gpu.measure(cell("decode", requests=2, context=96))}
    assert list(found) == ["dense", "sparq", "write", "write+close", "sdpa"]
    assert found["sparq"] | {"rival": "sdpa", "speedup_vs_rival": 2.0, "host_us": 50.0} == found["sparq"]
    assert found["dense"]["bytes_moved"] == 2 * 96 * 2 * 16 * 4
    assert found["dense"]["gb_per_s"] == round(2 * 96 * 2 * 16 * 4 / 8.0 / 1e3, 1)
    assert {"vllm_flash", "flash_attn", "flashinfer"} == found["dense"]["rivals_absent"].keys()
    assert "host_us" not in found["sdpa"]


def test_a_chunk_is_timed_with_its_arithmetic(gpu: worker.GpuWorker) -> None:
    found = {record["method"]: record for record in gpu.measure(cell("prefill", context=32, chunk=16))}
    assert list(found) == ["prefill", "sdpa"]
    operations = 4 * 2 * 16 * sum(range(33, 49))
    assert found["prefill"]["tflop_per_s"] == round(operations / 16.0 / 1e6, 1)
    assert found["prefill"]["speedup_vs_rival"] == 0.25


def test_restoring_the_codes_before_a_chunk_is_timed_too(gpu: worker.GpuWorker) -> None:
    coded = replace(cell("prefill", context=32, chunk=16), case=replace(LAYER, format="int8"))
    found = {record["method"]: record for record in gpu.measure(coded)}
    assert list(found) == ["prefill", "restore", "sdpa"]
    assert found["restore"]["bytes_moved"] == 32 * (2 * (16 + 4) + 2 * 16 * 4)
    assert "tflop_per_s" not in found["restore"]


def test_tables_are_as_wide_as_an_engines() -> None:
    made = layer.filled(cell("decode", requests=2, context=96), "cpu")
    assert made.table.shape == (2, 10)
    assert sorted(made.table[:, :6].flatten().tolist()) == list(range(12))
    narrow = layer.filled(replace(cell("decode", requests=2, context=96), table_tokens=96), "cpu")
    assert narrow.table.shape == (2, 6)


def test_checks_take_what_the_reference_answered_before(gpu: worker.GpuWorker, tmp_path: Path) -> None:
    one = replace(cell("check"), case=replace(LAYER, lens=(0, 40)))
    answer(one, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["check-x.pt"]
    found = gpu.measure(one)
    assert {"write", "dense_decode", "prefill twice"} <= {record["check"] for record in found}
    assert not [record for record in found if record["error"] > record["limit"]]


def test_a_failure_is_a_record_unless_the_device_is_lost(
    gpu: worker.GpuWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(message: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise RuntimeError(message)

        return fail

    monkeypatch.setattr(timing, "samples_us", failing("no kernel image"))
    assert gpu.measure(cell("decode", context=40))[0]["error"] == "RuntimeError: no kernel image"
    monkeypatch.setattr(timing, "samples_us", failing("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu.measure(cell("decode", context=40))
    assert not is_fatal(torch.OutOfMemoryError("CUDA error: out of memory"))


def test_what_no_card_of_this_size_has_room_for_is_no_failure(
    gpu: worker.GpuWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is only what is free that is too little: then it may have room later."""
    large = cell("decode", requests=64, context=1 << 17)
    (found,) = gpu.measure(large)
    assert "error" not in found
    assert found["no_room"] == f"needs {found['needed_gib']} GiB, and the card has 1.0 GiB in total"
    assert found["total_gib"] == 1.0
    assert found["needed_gib"] == pytest.approx(layer.n_bytes(large) / layer.MEMORY_SHARE / 2**30, abs=0.05)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    (found,) = gpu.measure(large)
    assert "no_room" not in found
    assert found["error"].startswith("MemoryError: needs ")
    assert found["error"].endswith(" GiB, and of 80.0 GiB 1.0 GiB are free")

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "samples_us", out_of_memory)
    (found,) = gpu.measure(cell("decode", context=40))
    assert found["error"] == "OutOfMemoryError: CUDA out of memory"


def test_far_pages_need_room_too(gpu: worker.GpuWorker) -> None:
    (found,) = gpu.measure(replace(cell("check"), case=replace(LAYER, far_bytes=1 << 30)))
    assert (found["needed_gib"], found["total_gib"]) == (1.2, 1.0)


def test_sdpa_attends_as_a_chunk_does() -> None:
    """Its rows are the last of the context, not the first."""
    torch.manual_seed(0)
    wanted = Attention(query=torch.randn(3, 4, 16), n_kv_heads=2, requests=1, context=5)
    key, value = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16)
    object.__setattr__(wanted, "contiguous", lambda: (key, value))
    got = sdpa(wanted)[1]()
    logits = torch.einsum("thd,shd->hts", wanted.query, key[0].repeat_interleave(2, 1)) / 4
    logits.masked_fill_(torch.ones(3, 5).triu(3).bool(), float("-inf"))
    want = torch.einsum("hts,shd->htd", logits.softmax(-1), value[0].repeat_interleave(2, 1))
    assert torch.allclose(got[0], want, atol=1e-5)
