"""The process that has the GPU. It may die of a cell: the next one starts another."""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_sparq.benchmarks.gpu import layer, session, timing
from vllm_sparq.benchmarks.gpu.cells import Cell
from vllm_sparq.benchmarks.gpu.checks import check_graph, run_checks
from vllm_sparq.benchmarks.gpu.rivals import is_fatal

SMI = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c"}
"""What nvidia-smi is asked after each cell -> name in a record."""


class GpuWorker:
    """Measures cells when told to.

    Args:
        folder: where `compiling.prepare` left what the reference answers.
    """

    def __init__(self, folder: Path) -> None:
        from triton import knobs

        self.folder, self.n_compiled = folder, 0
        knobs.compilation.listener = self._count

    def _count(self, *, cache_hit: bool, **_: Any) -> None:
        self.n_compiled += not cache_hit

    def about(self) -> dict[str, Any]:
        """The device, and the versions that decide what runs on it."""
        import triton

        found = torch.cuda.get_device_properties(0)
        return {
            "gpu": found.name,
            "capability": found.major * 10 + found.minor,
            "multiprocessors": found.multi_processor_count,
            "gpu_gib": layer.gib(found.total_memory),
            "driver": driver[0] if (driver := smi("driver_version")) else None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def measure(self, cell: Cell) -> list[dict[str, Any]]:
        """Its records; one with an ``error`` where it failed, and the device did not; or with ``no_room``.

        Raises:
            Exception: the device is lost to this process.
        """
        begin, self.n_compiled = time.monotonic(), 0
        try:
            layer.check_memory(cell)
            records = list(KINDS[cell.kind](self, cell))
        except layer.NoRoomError as error:
            records = [{session.NO_ROOM: str(error), "needed_gib": error.needed_gib, "total_gib": error.total_gib}]
        except Exception as error:
            if is_fatal(error):
                raise
            records = [{"error": f"{type(error).__name__}: {error}"[:1000]}]
        gc.collect()
        torch.cuda.empty_cache()
        about = {"seconds": round(time.monotonic() - begin, 2), "compiled_late": self.n_compiled, "clocks": clocks()}
        return [{**record, **about} for record in records]

    def check(self, cell: Cell) -> Iterator[dict[str, Any]]:
        path = self.folder / file_name(cell)
        want = torch.load(path, weights_only=False) if path.exists() else None  # our own file, of this run
        yield from run_checks(cell.case, layer.DEVICE, want)

    def graph(self, cell: Cell) -> Iterator[dict[str, Any]]:
        yield from check_graph(cell.case, layer.DEVICE, timing.capture)

    def copy(self, cell: Cell) -> Iterator[dict[str, Any]]:
        yield timing.copy_record()

    def decode(self, cell: Cell) -> Iterator[dict[str, Any]]:
        yield from layer.measure_decode(cell)

    def prefill(self, cell: Cell) -> Iterator[dict[str, Any]]:
        yield from layer.measure_prefill(cell)

    def kernels(self, cell: Cell) -> Iterator[dict[str, Any]]:
        yield from layer.measure_kernels(cell)


KINDS = {
    "check": GpuWorker.check,
    "graph": GpuWorker.graph,
    "copy": GpuWorker.copy,
    "decode": GpuWorker.decode,
    "prefill": GpuWorker.prefill,
    "kernels": GpuWorker.kernels,
}
"""Kind of cell -> what measures it."""


def file_name(cell: Cell) -> str:
    """Of what the reference answers."""
    return cell.name.replace("/", "-") + ".pt"


def clocks() -> dict[str, float] | None:
    """Of the device as it is now; None where nvidia-smi does not say."""
    found = smi(",".join(SMI))
    try:
        return None if found is None else dict(zip(SMI.values(), map(float, found), strict=True))
    except ValueError:  # "[N/A]", or other fields than were asked for
        return None


def smi(fields: str) -> list[str] | None:
    """What nvidia-smi says of the first device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.strip().splitlines()
    return [field.strip() for field in lines[0].split(",")] if done.returncode == 0 and lines else None
