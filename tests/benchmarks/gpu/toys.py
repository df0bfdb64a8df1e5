"""What looks like a GPU, or an engine on one, in a process of its own, in no time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.engine.cases import Case
from vllm_sparq.benchmarks.gpu.cells import Cell


class ToyEngine:
    """Takes what `GpuEngineWorker` takes; may run another attention than asked for, refuse graphs, or die."""

    def __init__(
        self, arguments: dict[str, Any], folder: Path, *, graphs: bool, max_model_len: int, more: dict[str, Any]
    ) -> None:
        self.backend, self.more = more.get("runs", arguments.get("attention_backend", "FLASH_ATTN")), more
        if graphs and more.get("graphs") == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")

    def describe(self) -> dict[str, Any]:
        return {
            "report": {"layer": {"backend": self.backend, "impl": "Impl"}},
            "kv_capacity_tokens": 400_000,
            "start_s": 40.0,
            "graph_mode": "FULL",
        }

    def prefill_s(self, context: int) -> float:
        return context / 1e5

    def prepare(self, case: Case) -> None:
        if self.more.get("dies") == case.batch:
            print("CUDA error: an illegal memory access was encountered", flush=True)
            os._exit(6)

    def step_ms(self, n_steps: int) -> list[float]:
        return [10.0 if self.backend == "FLASH_ATTN" else 4.0] * n_steps


class ToyGpu:
    """Takes what `GpuWorker` takes; dies of copies, has no room for one cell, and one check is wrong."""

    def __init__(self, folder: Path) -> None:
        assert folder.is_dir()

    def about(self) -> dict[str, Any]:
        return {"gpu": "NVIDIA H100", "capability": 90, "multiprocessors": 132, "gpu_gib": 79.2, "driver": "580.1"}

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        if cell.kind == "copy":
            print("Segmentation fault", flush=True)
            os._exit(139)
        if cell.kind == "check":
            return [{"check": "write", "error": float(cell.name == "check/heads"), "limit": 0}]
        if cell.name == "decode/model/b64s128k":
            return [{"no_room": "needs 90.0 GiB, and the card has 79.2 GiB in total", "needed_gib": 90.0}]
        return [{"method": "dense", "median_us": 1.0, "host_us": 2.0, "rival": "sdpa", "speedup_vs_rival": 1.0}]
