"""Which implementation of an op runs, and why. Resolved once, when a layer is built; never per call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

IMPLEMENTATIONS = {
    "write": {
        "reference": "vllm_sparq.ops.write.reference:write",
        "cpu": "vllm_sparq.ops.write.cpu:write",
        "triton": "vllm_sparq.ops.write.triton:write",
    },
    "dense_decode": {
        "reference": "vllm_sparq.ops.dense_decode.reference:dense_decode",
        "cpu": "vllm_sparq.ops.dense_decode.cpu:dense_decode",
        "triton": "vllm_sparq.ops.dense_decode.triton:dense_decode",
    },
    "sparq_decode": {
        "reference": "vllm_sparq.ops.sparq_decode.reference:sparq_decode",
        "cpu": "vllm_sparq.ops.sparq_decode.cpu:sparq_decode",
        "triton": "vllm_sparq.ops.sparq_decode.triton:sparq_decode",
    },
    "quest_decode": {
        "reference": "vllm_sparq.ops.quest_decode.reference:quest_decode",
        "cpu": "vllm_sparq.ops.quest_decode.cpu:quest_decode",
        "triton": "vllm_sparq.ops.quest_decode.triton:quest_decode",
    },
    "evict": {
        "reference": "vllm_sparq.ops.evict.reference:evict",
        "cpu": "vllm_sparq.ops.evict.cpu:evict",
        "triton": "vllm_sparq.ops.evict.triton:evict",
    },
    "prefill": {
        "reference": "vllm_sparq.ops.prefill.reference:prefill",
        "cpu": "vllm_sparq.ops.prefill.cpu:prefill",
        "triton": "vllm_sparq.ops.prefill.triton:prefill",
    },
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
