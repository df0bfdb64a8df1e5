"""What vLLM calls at start-up, in every process: names only, nothing heavy, safe to call twice."""

from __future__ import annotations

import logging
from typing import Any

from vllm_sparq import compat
from vllm_sparq.backends import BACKENDS

logger = logging.getLogger("vllm.sparq")  # below vLLM's own logger, so that its handlers print us


def register() -> None:
    """Entry point `vllm.general_plugins`: make the names known to vLLM.

    An unsupported vLLM is left alone with an error in the log: users who do not ask for sparq must not be stopped by
    us, and those who do are told by vLLM that the backend is unknown, right below our reason.
    """
    problem = compat.unsupported_vllm()
    if problem:
        logger.error("vllm-sparq is switched off: %s.", problem)
        return
    for name in BACKENDS:
        ensure_backend(name)
    _guard_bypassed_platform()


def ensure_backend(name: str) -> Any:
    """The member of vLLM's backend enum for one of ours, registered if need be."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if name not in AttentionBackendEnum.__members__:
        register_backend(name, BACKENDS[name])
        member: Any = AttentionBackendEnum[name]
        # A member added at run time pickles by value, which a spawned process cannot look up before plugins are loaded
        # there. Pickled like this, it brings its own registration along.
        member.__reduce_ex__ = lambda protocol: (ensure_backend, (name,))
    return AttentionBackendEnum[name]


def platform() -> str | None:
    """Entry point `vllm.platform_plugins`: our subclass of the built-in platform, or None where there is none."""
    if compat.unsupported_vllm():
        return None
    from vllm.platforms import builtin_platform_plugins

    for builtin, ours in (
        ("cuda", "vllm_sparq.platform.SparqCudaPlatform"),
        ("cpu", "vllm_sparq.platform.SparqCpuPlatform"),
    ):
        found = builtin_platform_plugins[builtin]()
        if found in (compat.CPU_PLATFORM, compat.CUDA_PLATFORM):
            return ours
    return None


def _guard_bypassed_platform() -> None:
    """Where vLLM did not take our platform, its CPU platform must refuse our names instead of running dense attention.

    vLLM skips platform plugins when VLLM_TARGET_DEVICE=cpu is set, and its own CPU platform answers every backend with
    CPU_ATTN. Remove when CpuPlatform.get_attn_backend_cls honours registered backends.
    """
    from vllm.platforms import current_platform

    platform_class: Any = type(current_platform)
    if not current_platform.is_cpu() or getattr(platform_class, "serves_sparq", False):
        return
    original = platform_class.check_and_update_config.__func__
    if hasattr(original, "guards_sparq"):
        return

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        from vllm_sparq.attention_backends.engine import selected_backends

        if selected_backends(vllm_config):
            raise RuntimeError(
                f"vllm-sparq cannot start: vLLM uses {cls.__name__} without our platform plugin and would run dense "
                "attention instead. Unset VLLM_TARGET_DEVICE, and let VLLM_PLUGINS, if it is set, name sparq"
            )
        original(cls, vllm_config)

    check_and_update_config.guards_sparq = True  # type: ignore[attr-defined]
    platform_class.check_and_update_config = classmethod(check_and_update_config)
