"""Triton and the compiled parts of vLLM's CUDA build, as far as they are asked for."""

from __future__ import annotations

import sys
import types
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

from tests.cuda.pretend.device import always
from tests.cuda.pretend.graphs import record


def install() -> None:
    _triton()
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    flash: Any = types.ModuleType("vllm.vllm_flash_attn")
    for name in ("compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"):
        setattr(flash, name, None)
    flash.is_fa_version_supported, flash.fa_version_unsupported_reason = always(True), always(None)
    sys.modules["vllm.vllm_flash_attn"] = flash


def _triton() -> None:
    """A backend named ``cpu``, which vLLM's CPU build looks for; and launches that graphs record."""
    from triton import backends
    from triton.runtime import interpreter

    driver = type("Driver", (), {"is_active": staticmethod(always(True))})
    backends.backends["cpu"] = backends.Backend(compiler=None, driver=driver)
    launch = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            record(lambda: launch(self, *args, **kwargs))
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = recorded


def record_native() -> None:
    """Calls of our C++ are launches too."""
    from vllm_sparq.ops import native

    find = native.function

    def function(name: str) -> Any:
        call = find(name)

        def recorded(*args: Any) -> None:
            record(lambda: call(*args))
            call(*args)

        return recorded

    native.function = function
