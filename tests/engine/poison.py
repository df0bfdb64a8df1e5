"""Bytes that no request may read: NaN in every block that nobody owns, before every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

POISON = 0xFF
"""As bytes of fp32, bf16 and fp16 it is NaN, as int32 it is -1, as a code it is the largest."""


def caches(llm: Any) -> list[Any]:
    """The KV tensor of every layer of ours, uint8 [blocks, pages, G, N, bytes per token]."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    ours = [layer.kv_cache for layer in layers if type(getattr(layer, "impl", None)).__name__ == "PagedImpl"]
    n_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return [cache.unflatten(0, (n_blocks, -1)) for cache in ours]


def unowned(pool: Any) -> list[int]:
    """Null block 0, and the free blocks that no prompt can find in the prefix cache."""
    free = pool.free_block_queue.get_all_free_blocks()
    return [pool.null_block.block_id, *(block.block_id for block in free if block.block_hash is None)]


@contextmanager
def poisoned(llm: Any) -> Iterator[list[int]]:
    """Poison what nobody owns before each step is planned; how many blocks that were, a step an entry.

    Before, and not after: a request that evicts gives blocks back in the step that reads them for the last time.
    """
    core = llm.llm_engine.engine_core.engine_core
    assert not core.vllm_config.scheduler_config.async_scheduling, "steps would be planned while others run"
    scheduler, tensors, counts = core.scheduler, caches(llm), []
    assert tensors
    plan = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        blocks = unowned(scheduler.kv_cache_manager.block_pool)
        counts.append(len(blocks))
        for tensor in tensors:
            tensor[blocks] = POISON
        return plan(*args, **kwargs)

    scheduler.schedule = schedule
    try:
        yield counts
    finally:
        scheduler.schedule = plan
