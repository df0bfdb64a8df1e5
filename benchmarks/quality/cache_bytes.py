"""KV bytes of a method for a model: what an output token makes it read, and what a cached token keeps.

Counted from the layout of our pages, as `vllm-sparq bench ops` counts them. SparQ's authors count elements of a second
copy of K in the model's type; ours is int4 unless told otherwise. Blocks count as full, and as 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE, page_layout
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.config import Options
from vllm_sparq.reads import DenseRead, HeadShape


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a model caches.

    Attributes:
        n_layers: with full attention.
        n_heads: query heads.
        n_kv_heads: KV heads.
        head_size: elements of one key.
        dtype: of the model.
        max_model_len: positions of the model.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_model_len: int

    @classmethod
    def of(cls, model: Path, dtype: str) -> CacheShape:
        """From the model's config.json."""
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(model)
        text = config.get_text_config()
        n_heads, n_layers = int(text.num_attention_heads), int(text.num_hidden_layers)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * n_layers
        return cls(
            n_layers=sum(kind == "full_attention" for kind in kinds),
            n_heads=n_heads,
            n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
            head_size=int(getattr(text, "head_dim", None) or text.hidden_size // n_heads),
            dtype=getattr(torch, str(text.dtype).removeprefix("torch.") if dtype == "auto" else dtype),
            max_model_len=int(text.max_position_embeddings),
        )

    @property
    def heads(self) -> HeadShape:
        """Of one layer, all of them on one worker."""
        return HeadShape(head_size=self.head_size, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads)

    @property
    def dense_bytes(self) -> int:
        """K and V of one token in the model's type, all layers."""
        return 2 * self.head_size * self.dtype.itemsize * self.n_kv_heads * self.n_layers

    def held(self, method: Method, context: int) -> float:
        """Bytes of cache for each token of a context, everything that a page carries included."""
        if method.backend is None:
            return self.dense_bytes
        options = method.parsed
        layout = page_layout(options, self.heads, PREFERRED_BLOCK_SIZE, self.dtype)
        per_token = layout.bytes_per_token * self.n_kv_heads * self.n_layers
        return per_token * _kept(options, context) / context

    def moved(self, method: Method, context: int) -> int:
        """Bytes of cache that one output token reads at a context of so many tokens, all layers.

        With a mass they are the most that it may read.
        """
        if method.backend is None:
            return self.dense_bytes * context
        options = method.parsed
        read, layout = options.read_of(self.heads), page_layout(options, self.heads, PREFERRED_BLOCK_SIZE, self.dtype)
        kept = _kept(options, context)
        n_dense = min(options.dense_layers, self.n_layers)
        dense, sparse = DenseRead().bytes_moved(layout, kept), read.bytes_moved(layout, kept)
        return self.n_kv_heads * int(dense * n_dense + sparse * (self.n_layers - n_dense))


def _kept(options: Options, context: int) -> int:
    """Tokens of a context that stay while an answer to a prompt of so many tokens is written."""
    retention = options.retained(PREFERRED_BLOCK_SIZE)
    return context if retention is None else min(context, retention.budget_of(context))
