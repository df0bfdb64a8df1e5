"""KV cache specs: how vLLM learns the true size of our pages, and how many blocks a request needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, KVCacheSpec

from vllm_sparq.layout import ALIGNMENT, PageLayout
from vllm_sparq.retention import Retention

SHARED_POOL = (
    "pressure='evict' hands a block over within the step that empties it, which is not safe beside layers of another "
    "kind (sliding windows, states) that use the same memory: use pressure 'preempt'"
)


@dataclass(frozen=True, kw_only=True)
class PagedSpec(FullAttentionSpec):
    """Blocks that hold several of our pages side by side.

    Beside layers with a state (Mamba, gated delta nets, convolutions) vLLM makes a block as large as a state, a
    thousand tokens and more. Our methods go on in pages of ``page_tokens``: a block is quantized, ranked and evicted
    from page by page. The worker's block table names pages (vLLM's *kernel blocks*), so only block managers see blocks.

    Attributes:
        page_tokens: N, tokens of a page; a block holds a whole number of pages.
    """

    page_tokens: int

    @classmethod
    def extending(cls, spec: FullAttentionSpec, **ours: Any) -> Self:
        """``spec`` with the fields that we add."""
        known: dict[str, Any] = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**known, **ours)

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
class StagedSpec(PagedSpec):
    """Pages of a quantized format. A request holds pages for its tokens, and ``n_staging_pages`` ahead of them.

    Attributes:
        n_staging_pages: pages in which the tokens of the newest page wait until it fills (`vllm_sparq.layout`).
        staged_per_page: how many of them fit into one.
        staged_bytes: what one of them takes, in one KV head.
        room: bytes of a page and KV head where that is more than the format needs (`PageLayout.room`), else 0.
    """

    n_staging_pages: int
    staged_per_page: int
    staged_bytes: int
    room: int = 0

    def with_room(self, page_bytes: int) -> Self:
        """This spec with pages of so many bytes in all KV heads, all of which staged tokens use."""
        padded = replace(self, page_size_padded=page_bytes)
        if not self.staged_bytes:
            return padded
        room = page_bytes // self.num_kv_heads // ALIGNMENT * ALIGNMENT
        per_page = room // self.staged_bytes
        n_pages = -(-self.page_tokens // per_page)
        return replace(padded, room=room, staged_per_page=per_page, n_staging_pages=n_pages)

    def with_staging(self, n_slots: int) -> int:
        """As if a request of so many tokens had so many more that its staging pages were theirs."""
        return (-(-n_slots // self.page_tokens) + self.n_staging_pages) * self.page_tokens

    def n_blocks(self, n_slots: int) -> int:
        """Blocks that a request with this many tokens holds."""
        return -(-self.with_staging(n_slots) // self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request at the model's full length; vLLM's start-up check and maximum concurrency follow from it."""
        return self.n_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of the worker's block table."""
        return self.n_blocks(max_len)


@dataclass(frozen=True, kw_only=True)
class RetainedSpec(StagedSpec):
    """Pages from which tokens are evicted, in any format: a request holds blocks for the tokens it keeps.

    Attributes:
        retention: which number of tokens stays, and when others go.
        shares_pool: whether layers of another kind have their blocks in the same memory.
    """

    retention: Retention
    shares_pool: bool = False

    @property
    def prefix_cacheable(self) -> bool:
        """What a block holds after an eviction depends on the whole request."""
        return False

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Of one request at the model's full length: its whole prompt for a moment, or what it may ever keep."""
        n_tokens = vllm_config.model_config.max_model_len
        return self.n_blocks(self.retention.most_slots(n_tokens, n_tokens, answering=False)) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class ChunksSpec(ChunkedLocalAttentionSpec):
    """Layers that attend within chunks, on vLLM's own backend beside ours, with blocks of another length than ours."""

    @classmethod
    def of(cls, spec: ChunkedLocalAttentionSpec) -> Self:
        """``spec`` under this name, which brings a block manager of ours."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(ChunkedLocalAttentionSpec) if f.init})


def page_spec(spec: FullAttentionSpec, layout: PageLayout, retention: Retention | None = None) -> FullAttentionSpec:
    """``spec`` with our pages in place of vLLM's: raw bytes, ``layout.bytes_per_token`` for each token and KV head.

    ``spec.block_size`` may be any number of pages, or the single token that vLLM asks about before it chooses one.
    Everything vLLM derives from a spec (the number of blocks, maximum concurrency, the start-up memory check) follows.
    """
    spec = replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)
    quantized, page_tokens = layout.quantized is not None, layout.block_size
    staging = dict(n_staging_pages=0, staged_per_page=0, staged_bytes=0)
    if quantized:
        staging = dict(
            n_staging_pages=layout.n_staging_blocks,
            staged_per_page=layout.staged_per_page,
            staged_bytes=layout.record_bytes,
        )
    if retention is not None:
        return RetainedSpec.extending(spec, page_tokens=page_tokens, **staging, retention=retention)
    if quantized:
        return StagedSpec.extending(spec, page_tokens=page_tokens, **staging)
    return spec if spec.block_size == page_tokens else PagedSpec.extending(spec, page_tokens=page_tokens)


def know_each_other(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """The specs of a worker's layers, those that evict told of the others."""
    if all(spec == next(iter(specs.values())) for spec in specs.values()):
        return specs
    return {
        name: replace(spec, shares_pool=True) if isinstance(spec, RetainedSpec) else spec
        for name, spec in specs.items()
    }


def is_ours(spec: Any) -> bool:
    """Whether a spec stands for our pages."""
    return isinstance(spec, FullAttentionSpec) and spec.dtype == torch.uint8 and spec.state_content_bytes is not None
