"""``read: dense``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_sparq.reads.base import Read


@dataclass(frozen=True, kw_only=True)
class DenseRead(Read):
    """Every token, every step."""

    op: ClassVar[str] = "dense_decode"
    meaningless: ClassVar[tuple[str, ...]] = (
        "compression",
        "r",
        "k",
        "local",
        "min_k",
        "mass",
        "ranking",
        "mean_value",
        "group_reduce",
    )
    instead: ClassVar[str] = "set read 'sparq'"

    @property
    def arguments(self) -> dict[str, Any]:
        return {}
