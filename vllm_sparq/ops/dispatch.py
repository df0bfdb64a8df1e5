"""Which implementation of an op runs, and why. Resolved once, when a layer is built; never per call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from vllm_sparq.reads import READS

OPS = ("write", "prefill", *sorted({read.op for read in READS.values()}), "evict")
"""What layers call. The decode ops are those of the reads."""

IMPLEMENTATIONS = {
    op: {name: f"vllm_sparq.ops.{op}.{name}:{op}" for name in ("reference", "cpu", "triton")} for op in OPS
}
"""op -> implementation -> where it is. Strings, so that nothing is imported before it is chosen."""

OVERRIDE = "VLLM_SPARQ_IMPL"
"""Environment variable that forces one implementation of every op, for debugging."""


@dataclass(frozen=True)
class Choice:
    """The implementation of an op on a device, and the reason in words."""

    op: str
    implementation: str
    reason: str

    def load(self) -> Callable[..., None]:
        """Import the chosen function."""
        module, function = IMPLEMENTATIONS[self.op][self.implementation].split(":")
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


def choose(op: str, device_type: str) -> Choice:
    """The implementation of ``op`` for ``cpu`` or ``cuda``.

    Raises:
        ValueError: the override names no implementation of this op.
        NotImplementedError: a device that nothing here runs on.
    """
    known = IMPLEMENTATIONS[op]
    forced = os.environ.get(OVERRIDE)
    if forced:
        if forced not in known:
            raise ValueError(f"{OVERRIDE}={forced!r} is not an implementation of {op}: use one of {list(known)}")
        return Choice(op, forced, f"forced by {OVERRIDE}")
    if device_type == "cuda":
        return Choice(op, "triton", "CUDA device")
    if device_type == "cpu":
        from vllm_sparq.ops import native

        found = native.find()
        if found.library is not None:
            return Choice(op, "cpu", found.reason)
        return Choice(op, "reference", found.reason)
    raise NotImplementedError(f"no implementation of {op} for device {device_type!r}: vllm-sparq runs on cpu and cuda")
