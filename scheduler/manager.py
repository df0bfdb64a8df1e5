"""Block managers: which blocks a request holds."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparq.scheduler.spec import StagedSpec


class StagingManager(FullAttentionManager):
    """Full attention, with blocks in front of every request in which its newest, unquantized block is staged.

    A request of S tokens holds ``ceil(S / N) + n_staging_blocks`` blocks. Blocks behind the newest are never full, so
    they are never shared: what is staged in them belongs to the request alone, and goes when its blocks go.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
    """A hit inside a block would need the block's tokens before it was quantized, and those are gone."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        n_blocks: int = super().get_num_blocks_to_allocate(request_id, self._with_staging(num_tokens), *args, **kwargs)
        return n_blocks

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        return super().allocate_new_blocks(request_id, self._with_staging(num_tokens), *args, **kwargs)

    def _with_staging(self, num_tokens: int) -> int:
        """As if the request had so many tokens more that the staging blocks were theirs."""
        spec: Any = self.kv_cache_spec
        n_tokens: int = num_tokens + spec.n_staging_blocks * self.block_size
        return n_tokens

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        """A block that is not full holds nothing yet that another request could use."""


def register_specs() -> None:
    """Make our specs known to vLLM; safe to call twice."""
    # Registering into an empty table would keep vLLM from ever adding its own.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(StagedSpec, StagingManager, uniform_type_base_spec=StagedSpec)
