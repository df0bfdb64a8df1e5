"""KV bytes of a method for a model: what an output token makes it read, and what a cached token keeps.

Counted from the layout of our pages, as `vllm-sparq bench ops` counts them. SparQ's authors count elements of a second
copy of K in the model's type; ours is int4 unless told otherwise. Blocks count as full, and as 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sparq.attention_backends.engine import PREFERRED_BLOCK_SIZE, page_layout
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.config import Options
from vllm_sparq.reads import DenseRead


@dataclass(frozen=True, kw_only=True)
class CacheShape(ModelShape):
    """What a model caches, and what of it a method keeps and reads."""

    def held(self, method: Method, context: int) -> float:
        """Bytes of cache for each token of a context, everything that a page carries included."""
        if method.backend is None:
            return self.dense_bytes * method.given(context) / context
        options = method.parsed
        layout = page_layout(options, self.heads, PREFERRED_BLOCK_SIZE, self.dtype)
        per_token = layout.bytes_per_token * self.n_kv_heads * self.n_layers
        return per_token * kept_tokens(options, context) / context

    def moved(self, method: Method, context: int) -> int:
        """Bytes of cache that one output token reads at a context of so many tokens, all layers.

        With a mass they are the most that it may read.
        """
        if method.backend is None:
            return self.dense_bytes * method.given(context)
        options = method.parsed
        read, layout = options.read_of(self.heads), page_layout(options, self.heads, PREFERRED_BLOCK_SIZE, self.dtype)
        kept = kept_tokens(options, context)
        n_dense = min(options.dense_layers, self.n_layers)
        dense, sparse = DenseRead().bytes_moved(layout, kept), read.bytes_moved(layout, kept)
        return self.n_kv_heads * int(dense * n_dense + sparse * (self.n_layers - n_dense))


def kept_tokens(options: Options, context: int) -> int:
    """Tokens of a context that stay while an answer to a prompt of so many tokens is written."""
    retention = options.retained(PREFERRED_BLOCK_SIZE)
    return context if retention is None else min(context, retention.budget_of(context))
