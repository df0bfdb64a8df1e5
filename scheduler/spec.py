"""KV cache specs: how vLLM learns the true size of our pages."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparq.layout import PageLayout


@dataclass(frozen=True, kw_only=True)
class StagedSpec(FullAttentionSpec):
    """Pages of a quantized format. A request holds blocks for its tokens, and ``n_staging_blocks`` ahead of them.

    Attributes:
        n_staging_blocks: blocks in which the tokens of the newest block wait until it fills (`vllm_sparq.layout`).
        staged_per_page: how many of them fit into one.
    """

    n_staging_blocks: int
    staged_per_page: int

    @classmethod
    def staging(cls, spec: FullAttentionSpec, *, n_staging_blocks: int, staged_per_page: int) -> Self:
        """``spec`` with the fields that we add."""
        known: dict[str, Any] = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**known, n_staging_blocks=n_staging_blocks, staged_per_page=staged_per_page)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request at the model's full length; vLLM's start-up check and maximum concurrency follow from it."""
        return super().max_memory_usage_bytes(vllm_config) + self.n_staging_blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of the worker's block table."""
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.n_staging_blocks

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the layers of a cache group, which must be alike; vLLM's own would lose our fields."""
        staging = {(spec.n_staging_blocks, spec.staged_per_page) for spec in specs}
        if len(staging) > 1:
            raise ValueError(f"layers of one KV cache group must be staged alike, got {sorted(staging)}")
        n_blocks, per_page = staging.pop()
        merged = FullAttentionSpec.merge(list(specs))
        return cls.staging(merged, n_staging_blocks=n_blocks, staged_per_page=per_page)


def page_spec(spec: FullAttentionSpec, layout: PageLayout) -> FullAttentionSpec:
    """``spec`` with our pages in place of vLLM's: raw bytes, ``layout.bytes_per_token`` for each token and KV head.

    Everything vLLM derives from a spec (the number of blocks, maximum concurrency, the start-up memory check) follows.
    """
    spec = replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)
    if layout.quantized is None:
        return spec
    return StagedSpec.staging(spec, n_staging_blocks=layout.n_staging_blocks, staged_per_page=layout.staged_per_page)
