"""The backend vLLM selects by name: what it can serve, and how large its pages are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_sparq.attention_backends import refusals
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.impl import PagedImpl
from vllm_sparq.attention_backends.steps.builder import PagedMetadataBuilder
from vllm_sparq.backends import PRESETS
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE
from vllm_sparq.reads import HeadShape
from vllm_sparq.scheduler.spec import PagedSpec, page_spec


class PagedBackend(AttentionBackend):
    """Our attention over pages, whatever they hold and whatever is read of them.

    See `vllm_sparq.layout` for the pages and `vllm_sparq.ops` for the operations.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = list(refusals.DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(refusals.KV_CACHE_DTYPES)

    # The write needs the block table, not the runner's slots: it finishes a page at the page's first and last token.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(refusals.HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        if isinstance(kv_cache_spec, PagedSpec) and kv_cache_spec.block_size != kv_cache_spec.page_tokens:
            return [kv_cache_spec.page_tokens]  # block tables name our pages then, several to a block
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return int(get_current_vllm_config().cache_config.block_size)  # our platform has chosen it

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # The bytes of one block and KV head must be contiguous: they are a page.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if type(spec) is not FullAttentionSpec:  # a sliding-window probe, served by vLLM's own backend
            return spec
        config = get_current_vllm_config()
        engine = PagedEngine.of(config)
        assert engine is not None
        heads = HeadShape(
            head_size=spec.head_size,
            n_heads=config.model_config.get_num_attention_heads(config.parallel_config),
            n_kv_heads=spec.num_kv_heads,
        )
        return page_spec(spec, engine.layout(heads, spec.dtype), engine.retention)


def _preset(name: str) -> type[PagedBackend]:
    """A backend under a name of its own: what else it means are its default options."""

    def get_name() -> str:
        return name.upper()

    body = {"get_name": staticmethod(get_name), "__doc__": f"{PRESETS[name].summary}.", "__module__": __name__}
    return type(f"{name.title()}Backend", (PagedBackend,), body)


globals().update({f"{name.title()}Backend": _preset(name) for name in PRESETS})
