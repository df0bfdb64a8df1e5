"""The names that ``--attention-backend`` takes, and the options that each starts with: one row per backend.

All of them are one attention class over three choices: how blocks store tokens (``format``), which tokens stay
(``retention``), and what a decode step reads (``read``). A name is a preset of these; any option beside it wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A backend.

    Attributes:
        options: the defaults that it changes.
        summary: what it does, for people.
    """

    summary: str
    options: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "sparq": Preset(summary="reads the few tokens that SparQ ranks highest"),
    "quest": Preset(
        summary="reads the few spans of 16 tokens that the bounds of their keys rank highest",
        options={"read": "spans", "dense_layers": 2},
    ),
    "infllm": Preset(
        summary="reads the first tokens, the newest, and the spans between whose representative keys rank highest",
        options={"read": "infllm"},
    ),
    "flexgen": Preset(summary="stores blocks as int4", options={"format": "int4", "read": "dense"}),
    "kivi": Preset(
        summary="stores blocks as 4 or 2 bits, keys by channel", options={"format": "kivi4", "read": "dense"}
    ),
    "h2o": Preset(
        summary="keeps the tokens with the most attention, and the newest",
        options={"retention": "heavy_hitter", "read": "dense"},
    ),
    "streaming": Preset(
        summary="keeps the first and the newest tokens", options={"retention": "window", "read": "dense"}
    ),
}
"""``--attention-backend`` in lower case -> what it stands for."""

BACKENDS = {name.upper(): f"vllm_sparq.attention_backends.backend.{name.title()}Backend" for name in PRESETS}
"""Name in vLLM's registry -> class."""
