"""Block managers: which blocks a request holds."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager, FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparq.retention import Phase, Retention
from vllm_sparq.scheduler.spec import ChunksSpec, PagedSpec, RetainedSpec, StagedSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request


class StagingManager(FullAttentionManager):
    """Full attention, with blocks in front of every request in which its newest, unquantized block is staged.

    A request of S tokens holds ``ceil(S / N) + n_staging_pages`` pages, in whole blocks. Blocks that hold pages after
    the newest are never full, so they are never shared: what is staged in them belongs to the request alone, and goes
    when its blocks go.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
    """A hit inside a block would need the block's tokens before it was quantized, and those are gone."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        n_tokens = self._with_staging(self._slots(request_id, num_tokens))
        n_blocks: int = super().get_num_blocks_to_allocate(request_id, n_tokens, *args, **kwargs)
        return n_blocks

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
        n_tokens = self._with_staging(self._slots(request_id, num_tokens))
        return super().allocate_new_blocks(request_id, n_tokens, *args, **kwargs)

    def _slots(self, request_id: str, num_tokens: int) -> int:
        """Slots that the first ``num_tokens`` of a request take."""
        return num_tokens

    def _with_staging(self, num_tokens: int) -> int:
        """As if the request had so many tokens more that the staging pages were theirs."""
        spec: Any = self.kv_cache_spec
        n_tokens: int = spec.with_staging(num_tokens)
        return n_tokens

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        """A block that is not full holds nothing yet that another request could use."""


class RetainingManager(StagingManager):
    """Blocks for the tokens that a request keeps; those that its prompt needed beyond go back when it has been read.

    They go back in the very step that evicts. That is safe because a step evicts before it writes, in each layer: the
    worker, which is not told, still knows the blocks and reads them first; only then may their next owner write. And
    since the request never grows beyond its budget again, nobody looks at those entries of its block table later.

    Where layers of another kind have their blocks in the same memory, one of them may write, or vLLM may zero a block,
    before a layer of ours has evicted: there blocks go back a step later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_lens: dict[str, int] = {}
        self.answering: set[str] = set()
        self.shrunk: dict[str, Phase] = {}
        self.n_blocks_returned = 0

    @property
    def retention(self) -> Retention:
        """Numbers of this engine."""
        spec: Any = self.kv_cache_spec
        retention: Retention = spec.retention
        return retention

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Of a request that vLLM is about to schedule: what it need not hold any more goes back."""
        if num_prompt_tokens is None:
            raise RuntimeError("vLLM did not say how long a prompt is, without which tokens cannot be evicted from it")
        if self.prompt_lens.setdefault(request_id, num_prompt_tokens) != num_prompt_tokens:
            raise RuntimeError(
                f"a prompt grew from {self.prompt_lens[request_id]} to {num_prompt_tokens} tokens over blocks from "
                "which tokens were evicted: resumable requests need the scheduler of vllm-sparq, leave --scheduler-cls "
                "out"
            )
        if processed_computed_tokens >= num_prompt_tokens:
            self.answering.add(request_id)
            spec: Any = self.kv_cache_spec
            if processed_computed_tokens > num_prompt_tokens or not spec.shares_pool:
                self.give_back(request_id)

    def give_back(self, request_id: str) -> int:
        """Return the blocks of an answering request beyond its budget to the pool; how many these were."""
        capacity = -(-self._with_staging(self.phase(request_id).budget) // self.block_size)
        blocks = self.req_to_blocks.get(request_id, [])
        tail = blocks[capacity:]
        del blocks[capacity:]
        self.block_pool.free_blocks(reversed(tail))
        self.n_blocks_returned += len(tail)
        return len(tail)

    def phase(self, request_id: str) -> Phase:
        """The budget that holds for an answer now."""
        return self.shrunk.get(request_id) or self.retention.answer(self.prompt_lens[request_id])

    def _slots(self, request_id: str, num_tokens: int) -> int:
        # Of a request that nobody has told of (`knowing_prompts`), all tokens are its prompt.
        prompt_len = self.prompt_lens.get(request_id, num_tokens)
        answering = request_id in self.answering
        return self.retention.most_slots(num_tokens, prompt_len, answering=answering, phase=self.shrunk.get(request_id))

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """The request ends or is preempted; it starts anew if it comes back."""
        self.prompt_lens.pop(request_id, None)
        self.answering.discard(request_id)
        self.shrunk.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing here can be shared."""

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> Any:
        """Nothing is found."""
        return tuple([] for _ in kv_cache_group_ids), 0


def knowing_prompts(manager: KVCacheManager) -> None:
    """Let ``manager.allocate_slots`` tell managers that evict how long a prompt is before it asks them for anything.

    vLLM asks first whether all of a request would fit, and says later where its prompt ends. For one that comes back
    after a preemption that is its answer too, of which it will keep no more than its budget: it would wait, and all
    others behind it, for many times the blocks that it takes, or forever.
    """
    retaining = [one for one in manager.coordinator.single_type_managers if isinstance(one, RetainingManager)]
    if not retaining:
        return
    allocate = manager.allocate_slots

    def told(request: Request, *args: Any, **kwargs: Any) -> Any:
        for one in retaining:
            one.prompt_lens.setdefault(request.request_id, request.num_prompt_tokens)
        return allocate(request, *args, **kwargs)

    manager.allocate_slots = told  # type: ignore[method-assign]


class ChunksManager(ChunkedLocalAttentionManager):
    """Layers that attend within chunks, whose cached prefixes end where those of other layers do, too.

    vLLM's own takes blocks of one length in all layers alone.
    """

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The longest prefix, a multiple of ``alignment_tokens``, whose last chunk is cached as far as it goes.

        Earlier chunks are not looked at any more: null blocks stand for them.

        Raises:
            ValueError: drafts by a model that would read the last block again.
        """
        if drop_eagle_block:
            raise ValueError("attention within chunks cannot be combined with EAGLE: leave --speculative-config out")
        size, chunk = kv_cache_spec.block_size, kv_cache_spec.attention_chunk_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        length = max_length - max_length % alignment_tokens
        while length:
            first, end = length // chunk * chunk // size, length // size
            asked = (block_pool.get_cached_block(hashes[i], kv_cache_group_ids) for i in range(first, end))
            found = list(itertools.takewhile(bool, asked))
            if len(found) == end - first:
                nulls = [block_pool.null_block] * first
                return tuple(nulls + [blocks[i] for blocks in found] for i in range(len(kv_cache_group_ids))), length
            length = (first + len(found)) * size // alignment_tokens * alignment_tokens
        return tuple([] for _ in kv_cache_group_ids), 0


def register_specs() -> None:
    """Make our specs known to vLLM; safe to call twice."""
    # Registering into an empty table would keep vLLM from ever adding its own.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(PagedSpec, FullAttentionManager, uniform_type_base_spec=PagedSpec)
    KVCacheSpecRegistry.register(StagedSpec, StagingManager, uniform_type_base_spec=StagedSpec)
    KVCacheSpecRegistry.register(RetainedSpec, RetainingManager, uniform_type_base_spec=RetainedSpec)
    KVCacheSpecRegistry.register(ChunksSpec, ChunksManager, uniform_type_base_spec=ChunksSpec)
