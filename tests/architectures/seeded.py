"""Random weights that depend on a parameter's name and shape alone: every engine of one model has the same."""

from __future__ import annotations

import zlib
from typing import Any

import torch

LOAD_FORMAT = "seeded"
ATTENTION_GAIN = 2.0
"""Queries and keys are this much longer than usual, so that attention is sharp enough to matter."""


def register() -> None:
    """Let ``load_format="seeded"`` mean this; safe to call twice."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if LOAD_FORMAT in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    class SeededLoader(BaseModelLoader):
        """Nothing to download: numbers from generators."""

        def download_model(self, model_config: Any) -> None:
            """Nothing."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            scaled = "gemma" in model_config.hf_text_config.model_type
            for name, parameter in model.named_parameters():
                found = values(name, parameter)
                if scaled and "embed_tokens" in name:  # tied, and multiplied in the model: else all it does is echo
                    found /= parameter.shape[-1]
                parameter.data.copy_(found)

    register_model_loader(LOAD_FORMAT)(SeededLoader)


def values(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """What a parameter starts with, float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    normal = torch.randn(parameter.shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last in ("A", "A_log"):  # decay of a state: negative, or the logarithm of its size
        return -torch.exp(0.3 * normal) if last == "A" else 0.3 * normal
    if last == "sinks":
        return normal
    if parameter.dim() == 1:
        return 0.1 * normal + (1 if last == "weight" else 0)
    if "embed" in name or "lm_head" in name or "wte" in name:
        return normal
    gain = ATTENTION_GAIN if any(part in name for part in ("qkv", "q_proj", "k_proj", "c_attn", "query_key")) else 1.0
    return gain * normal / parameter.shape[-1] ** 0.5
