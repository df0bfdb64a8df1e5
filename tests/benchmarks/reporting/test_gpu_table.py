"""The tables of docs/gpu.md, of a few records written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_sparq.benchmarks.reporting.gpu_table import (
    NOTHING,
    gpu_check_rows,
    gpu_decode_rows,
    gpu_engine_rows,
    gpu_prefill_rows,
)

ABOUT = {"bench": "gpu_ops", "gpu": "NVIDIA H100", "driver": "580.1", "torch": "2.13", "commit": "abc", "dirty": False}
RIVAL = "vLLM FlashAttention 3"


def decode(method: str, us: float, ratio: float, **more: Any) -> dict[str, Any]:
    cell = {"name": "decode/model/b16s32k", "kind": "decode", "requests": 16, "context": 32768, "host_us": 71.0}
    return {**ABOUT, **cell, "method": method, "median_us": us, "rival": RIVAL, "speedup_vs_rival": ratio, **more}


@pytest.mark.parametrize("rows", [gpu_check_rows, gpu_decode_rows, gpu_prefill_rows, gpu_engine_rows])
def test_nothing_measured_is_said(rows: Any) -> None:
    assert rows([]) == [NOTHING]
    assert rows([{"bench": "ops", "median_us": 1.0}]) == [NOTHING]
    assert rows([{"bench": bench, "name": "a", "left_out": "late"} for bench in ("gpu_ops", "gpu_engine")]) == [NOTHING]


def test_a_decode_step_stands_beside_its_rival() -> None:
    lines = [decode("dense", 900.0, 0.83), decode("sparq", 150.4, 4.99), decode(RIVAL, 750.0, 1.0)]
    assert gpu_decode_rows(lines) == [
        "| NVIDIA H100, driver 580.1, torch 2.13, commit abc | dense | sparse | rival | dense by rival "
        "| sparse by rival | host, sparse |",
        "|---|---|---|---|---|---|---|",
        f"| `decode/model/b16s32k` | 900 us | 150 us | 750 us, {RIVAL} | 0.83x | 4.99x | 71 us |",
    ]
    newer = [{**line, "median_us": 2 * line["median_us"]} for line in lines]
    assert "| 1,800 us | 301 us |" in gpu_decode_rows([*lines, *newer])[-1]
    of_other_code = [{**line, "commit": "def"} for line in lines]
    assert "commit abc" in gpu_decode_rows([*of_other_code, *lines])[0]
    assert gpu_decode_rows(lines[:2]) == [NOTHING]  # its rival died: there is no ratio to show


def test_a_chunk_stands_beside_its_rival() -> None:
    cell = {**ABOUT, "name": "prefill/int4/c32kt8k", "kind": "prefill", "rival": RIVAL}
    ours = {**cell, "method": "prefill", "median_us": 12_345.0, "tflop_per_s": 311.2, "speedup_vs_rival": 0.52}
    rival = {**cell, "method": RIVAL, "median_us": 6_400.0, "tflop_per_s": 600.4, "speedup_vs_rival": 1.0}
    line = f"| `prefill/int4/c32kt8k` | 12.35 ms, 311 TFLOP/s | 6.40 ms, 600 TFLOP/s, {RIVAL} | 0.52x | {{}} |"
    assert gpu_prefill_rows([ours, rival])[-1].replace("12.34 ms", "12.35 ms") == line.format("")
    restored = {**cell, "method": "restore", "median_us": 1_600.0, "gb_per_s": 2100.0}
    both = gpu_prefill_rows([ours, rival, restored])[-1].replace("12.34 ms", "12.35 ms")
    assert both == line.format("8.00 ms, 0.80x")


def test_failed_checks_are_named() -> None:
    def check(name: str, error: Any, **more: Any) -> dict[str, Any]:
        return {**ABOUT, "name": name, "kind": "check", "error": error, **more}

    lines = [
        check("check/model", 0.5, check="write", limit=0),
        check("check/model", 0.0, check="write", limit=0),  # mended since, on the same commit
        check("check/far", float("nan"), check="dense_decode", limit=0.01),
        check("check/int4", "the process of the GPU ended | CUDA error"),
        decode("dense", 1.0, 1.0),
    ]
    head, _, *rows = gpu_check_rows(lines)
    assert head == "| checks | passed | failed |"
    assert rows == [
        "| NVIDIA H100, driver 580.1, torch 2.13, commit abc | 1 | 1 |",
        "| `check/far`: dense_decode | | error nan, limit 0.01 |",
        "| `check/int4` | | the process of the GPU ended / CUDA error |",
    ]


def test_engines_stand_beside_dense_of_the_same_settings() -> None:
    def line(method: str, settings: str, ms: float, batch: int = 16) -> dict[str, Any]:
        about = {**ABOUT, "bench": "gpu_engine", "name": f"8b/{method}/{settings}", "method": method}
        return {**about, "what": "decode", "context": 32768, "batch": batch, "median_tpot_ms": ms}

    lines = [line("dense", "graphs", 30.0), line("sparq", "graphs", 12.0), line("dense", "eager", 60.0)]
    lines += [line("sparq", "eager", 20.0), line("kivi", "graphs", 10.0, batch=8)]
    shown = [row.split(" | ")[-1].removesuffix(" |") for row in gpu_engine_rows(lines)[2:]]
    assert shown == [
        "16 requests: 30.00 ms",
        "16 requests: 12.00 ms, 2.50x",
        "16 requests: 60.00 ms",
        "16 requests: 20.00 ms, 3.00x",
        "8 requests: 10.00 ms",
    ]
