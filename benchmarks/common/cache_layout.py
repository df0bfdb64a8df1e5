"""How an engine cuts its KV cache: part of the case that is measured, since two cuts are two results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_sparq.attention_backends.engine import page_layout, preferred_block_size
from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """What a key and a line say of a cache.

    Attributes:
        block_size: tokens per block; None in a key where vLLM's own attention chooses it.
        kv_bytes_per_token: of all layers, everything that a page carries included.
    """

    block_size: int | None
    kv_bytes_per_token: float

    @classmethod
    def of(cls, method: Method, shape: ModelShape, *, max_model_len: int, block_size: int | None = None) -> CacheLayout:
        """What an engine of the method will use, by the rule that engines follow.

        Args:
            method: what it runs.
            shape: of its model.
            max_model_len: positions that the engine has.
            block_size: what ``--block-size`` says, if anything.

        Raises:
            UsageError: pages cannot be cut so.
        """
        if method.backend is None:
            return cls(block_size=block_size, kv_bytes_per_token=shape.dense_bytes)
        options = method.parsed
        tokens = block_size or preferred_block_size(options, max_model_len)
        layout = page_layout(options, shape.heads, tokens, shape.dtype)
        per_token = layout.bytes_per_token * shape.n_kv_heads * shape.n_layers
        return cls(block_size=tokens, kv_bytes_per_token=round(per_token, 3))

    @property
    def fields(self) -> dict[str, Any]:
        """For a key or a line."""
        return asdict(self)


def layout_in_use(engine: Any) -> CacheLayout:
    """What the cache of an engine in this process is cut into, as vLLM has allocated it.

    Args:
        engine: a `vllm.v1.engine.llm_engine.LLMEngine` whose core runs in this process.
    """
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    per_token = sum(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes / group.kv_cache_spec.block_size
        for group in groups
    )
    return CacheLayout(block_size=engine.vllm_config.cache_config.block_size, kv_bytes_per_token=round(per_token, 3))
