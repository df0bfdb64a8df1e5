"""KV cache specs: how vLLM learns the true size of our pages, and how many blocks a request needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparq.layout import PageLayout
from vllm_sparq.retention import Retention


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
    def extending(cls, spec: FullAttentionSpec, **ours: Any) -> Self:
        """``spec`` with the fields that we add."""
        known: dict[str, Any] = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**known, **ours)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request at the model's full length; vLLM's start-up check and maximum concurrency follow from it."""
        return super().max_memory_usage_bytes(vllm_config) + self.n_staging_blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of the worker's block table."""
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.n_staging_blocks

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the layers of a cache group, which must be alike; vLLM's own would lose our fields.

        Raises:
            AssertionError: they are not, by which vLLM finds out that layers need groups of their own.
        """
        if any(type(spec) is not cls for spec in specs):
            raise AssertionError(f"layers of one KV cache group must be alike, got {[type(spec) for spec in specs]}")
        added = [f.name for f in fields(cls) if f.name not in {known.name for known in fields(FullAttentionSpec)}]
        ours = [{name: getattr(spec, name) for name in added} for spec in specs]
        if any(other != ours[0] for other in ours):
            raise AssertionError(f"layers of one KV cache group must store and keep tokens alike, got {ours}")
        return cls.extending(FullAttentionSpec.merge(list(specs)), **ours[0])


@dataclass(frozen=True, kw_only=True)
class RetainedSpec(StagedSpec):
    """Pages from which tokens are evicted, in any format: a request holds blocks for the tokens it keeps.

    Attributes:
        retention: which number of tokens stays, and when others go.
    """

    retention: Retention

    @property
    def prefix_cacheable(self) -> bool:
        """What a block holds after an eviction depends on the whole request."""
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request at the model's full length: its whole prompt for a moment, or what it may ever keep."""
        n_tokens = vllm_config.model_config.max_model_len
        n_slots = self.retention.most_slots(n_tokens, n_tokens, answering=False)
        return (-(-n_slots // self.block_size) + self.n_staging_blocks) * self.page_size_bytes


def page_spec(spec: FullAttentionSpec, layout: PageLayout, retention: Retention | None = None) -> FullAttentionSpec:
    """``spec`` with our pages in place of vLLM's: raw bytes, ``layout.bytes_per_token`` for each token and KV head.

    Everything vLLM derives from a spec (the number of blocks, maximum concurrency, the start-up memory check) follows.
    """
    spec = replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)
    quantized = layout.quantized is not None
    staging = dict(n_staging_blocks=layout.n_staging_blocks, staged_per_page=layout.staged_per_page if quantized else 0)
    if retention is not None:
        return RetainedSpec.extending(spec, **staging, retention=retention)
    return StagedSpec.extending(spec, **staging) if quantized else spec


def is_ours(spec: Any) -> bool:
    """Whether a spec stands for our pages."""
    return isinstance(spec, FullAttentionSpec) and spec.dtype == torch.uint8 and spec.state_content_bytes is not None
