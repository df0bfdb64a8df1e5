"""Bytes that no request may read: NaN in every block that nobody owns, before every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

POISON = 0xFF
"""As bytes of fp32, bf16 and fp16 it is NaN, as int32 it is -1, as a code it is the largest."""


def caches(llm: Any) -> list[Any]:
    """The KV tensor of every layer of ours, uint8 [blocks, pages, G, N, bytes per token]."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    ours = [layer.kv_cache for layer in layers if type(getattr(layer, "impl", None)).__name__ == "PagedImpl"]
    n_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return [cache.unflatten(0, (n_blocks, -1)) for cache in ours]


def unowned(pool: Any) -> set[int]:
    """Null block 0, and the free blocks that no prompt can find in the prefix cache."""
    return {pool.null_block.block_id, *(b.block_id for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is None)}


@contextmanager
def poisoned(llm: Any) -> Iterator[list[int]]:
    """Poison what nobody owns before each step is planned; how many blocks that were, a step an entry.

    Before, and not after: a request that evicts gives blocks back in the step that reads them for the last time. A step
    of an engine in this process is over when the next is planned, even where vLLM schedules ahead.
    """
    scheduler, counts = llm.llm_engine.engine_core.engine_core.scheduler, []
    plan, pool = scheduler.schedule, scheduler.kv_cache_manager.block_pool
    null = pool.null_block.block_id
    spoilt: set[int] = set()  # blocks that hold poison since an earlier step, and were nobody's ever since
    known: list[tuple[int, torch.Size]] = []

    def schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal known
        blocks, tensors = unowned(pool), caches(llm)
        counts.append(len(blocks))
        addresses = [(tensor.data_ptr(), tensor.shape) for tensor in tensors]
        if addresses != known:  # the engine has slept
            spoilt.clear()
            known = addresses
        for tensor in tensors if (new := sorted(blocks - spoilt)) else ():
            tensor[new] = POISON
        found = plan(*args, **kwargs)
        spoilt.clear()
        spoilt.update((blocks & unowned(pool)) - {null})  # anybody may write into block 0
        return found

    scheduler.schedule = schedule
    try:
        yield counts
    finally:
        scheduler.schedule = plan
