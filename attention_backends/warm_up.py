"""What a CUDA worker launches once at start, so that no step waits for a kernel to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vllm_sparq.attention_backends.impl import PagedImpl
from vllm_sparq.attention_backends.steps.evicting import answer_blocks
from vllm_sparq.scheduler.spec import RetainedSpec


@torch.inference_mode()
def warm_up(runner: Any, layers: dict[str, Any], max_model_len: int) -> None:
    """Launch every variant of the kernels of our layers; a layer's cache may begin elsewhere than another's.

    Args:
        runner: vLLM's model runner, of either generation, with its KV cache.
        layers: by name, what has an ``impl`` and a ``kv_cache``.
    """
    for group, width in zip(runner.kv_cache_config.kv_cache_groups, table_widths(runner), strict=True):
        for name in group.layer_names:
            impl = getattr(layers.get(name), "impl", None)
            if isinstance(impl, PagedImpl):
                spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
                impl.warm_up(layers[name], list(_widths_of_steps(spec, width, max_model_len)))


def table_widths(runner: Any) -> list[int]:
    """Columns of the block table of each KV cache group."""
    if hasattr(runner, "block_tables"):
        return [table.shape[1] for table in runner.block_tables.input_block_tables]
    return [table.block_table.gpu.shape[1] for table in runner.input_batch.block_table.block_tables]


def _widths_of_steps(spec: Any, width: int, max_model_len: int) -> Iterator[int]:
    yield width
    if isinstance(spec, RetainedSpec):
        yield answer_blocks(spec, max_model_len)
