"""What benchmarks have to know of a model before it is loaded, from its folder's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from vllm_sparq.console import DTYPES, UsageError, check_model
from vllm_sparq.reads import HeadShape


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers of a model.

    Attributes:
        n_layers: with full attention.
        n_heads: query heads.
        n_kv_heads: KV heads.
        head_size: elements of one key.
        dtype: of its elements.
        max_model_len: positions.
        vocab_size: tokens that it knows.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_model_len: int
    vocab_size: int = 0

    @classmethod
    def of(cls, folder: Path, dtype: str = "auto") -> Self:
        """Of a model's folder.

        Raises:
            UsageError: there is no model in the folder, or none that transformers can describe.
        """
        from transformers import AutoConfig

        folder = check_model(folder)
        try:
            return cls._of(AutoConfig.from_pretrained(folder), dtype)
        except UsageError:
            raise
        except Exception as error:  # of a broken file, transformers raises whatever its parsing stumbles upon
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(
                f"--model {folder}: its config.json does not describe a model of attention layers ({first}): "
                "give the folder of a model that transformers knows"
            ) from None

    @classmethod
    def of_config(cls, config: Mapping[str, Any], dtype: str = "auto") -> Self:
        """Of what a config.json says."""
        from transformers import AutoConfig

        return cls._of(AutoConfig.for_model(**config), dtype)

    @classmethod
    def _of(cls, config: Any, dtype: str) -> Self:
        text = config.get_text_config()
        n_heads, n_layers = int(text.num_attention_heads), int(text.num_hidden_layers)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * n_layers
        name = dtype
        if dtype == "auto":
            name = str(text.dtype or config.dtype or torch.float32).removeprefix("torch.")
            if name == "float32":  # unless asked for, vLLM takes the first type of its platform for these
                name = "bfloat16"
        return cls(
            n_layers=sum(kind == "full_attention" for kind in kinds),
            n_heads=n_heads,
            n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
            head_size=int(getattr(text, "head_dim", None) or text.hidden_size // n_heads),
            dtype=torch_dtype(name),
            max_model_len=int(text.max_position_embeddings),
            vocab_size=int(text.vocab_size),
        )

    @property
    def heads(self) -> HeadShape:
        """Of one layer, all of them on one worker."""
        return HeadShape(head_size=self.head_size, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads)

    @property
    def dense_bytes(self) -> int:
        """K and V of one token in the model's type, all layers with full attention."""
        return 2 * self.head_size * self.dtype.itemsize * self.n_kv_heads * self.n_layers


def torch_dtype(name: str) -> torch.dtype:
    """An element type of a model.

    Raises:
        UsageError: it is none that an engine of ours runs in.
    """
    if name not in DTYPES[:-1]:
        raise UsageError(f"--dtype {name!r} is not usable: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
