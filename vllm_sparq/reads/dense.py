"""``read: dense``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_sparq.reads.base import Read


@dataclass(frozen=True, kw_only=True)
class DenseRead(Read):
    """Every token, every step."""

    op: ClassVar[str] = "dense_decode"

    @property
    def arguments(self) -> dict[str, Any]:
        return {}
