"""The supported range of vLLM, and the names of vLLM's that have moved or may move. Imports nothing of vLLM."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34", prereleases=True)
"""String-named backends exist from 0.32 on; each new minor version is checked before it is let in."""

CPU_PLATFORM = "vllm.platforms.cpu.CpuPlatform"
CUDA_PLATFORM = "vllm.platforms.cuda.CudaPlatform"
CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
CUDA_WORKER = "vllm.v1.worker.gpu_worker.Worker"


def vllm_version() -> Version | None:
    """The installed vLLM, or None."""
    try:
        return Version(metadata.version("vllm"))
    except metadata.PackageNotFoundError:
        return None


def unsupported_vllm() -> str | None:
    """Why the installed vLLM cannot be used, with the remedy; None where it can."""
    found = vllm_version()
    if found is None:
        return f"vLLM is not installed; install vllm{SUPPORTED_VLLM}"
    if Version(found.base_version) not in SUPPORTED_VLLM:
        return (
            f"vLLM {found} is not supported: vllm-sparq is checked against vllm{SUPPORTED_VLLM}. "
            "Install a vLLM in that range, or a vllm-sparq made for yours"
        )
    return None
