"""vLLM's CPU worker with what our backends need from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, group_kernel_blocks
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sparq.attention_backends.worker import SparqWorkerMixin
from vllm_sparq.ops.huge_pages import advise_huge_pages

logger = init_logger("vllm.sparq")


def expanded(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> torch.Tensor:
    """``x[b]`` for each draft of request ``b``, and ``replace_to`` where that is ``replace_from``: of any dtype.

    vLLM's own on CPU writes numbers that are not whole into a copy (0.32 and 0.33), so that drafts are verified at a
    temperature of whatever was in memory.

    Args:
        x: [B], a parameter of sampling.
        cu_num_tokens: int [B], drafts of a request and of those before it.
        num_tokens: of all drafts.
        replace_from: a value.
        replace_to: what stands in its place.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts, output_size=num_tokens)


def constrained(constrain: Callable[..., Any]) -> Callable[..., Any]:
    """``apply_top_k_top_p``, which on CPU asks for the largest of no numbers where a step brings no draft after all."""

    def where_any(logits: torch.Tensor, *args: Any) -> Any:
        return constrain(logits, *args) if len(logits) else logits

    return where_any


def expanding(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a rejection sampler, with `expanded` in place of vLLM's own, and `constrained`."""
    constrain = constrained(apply_top_k_top_p)

    def with_expanded(*args: Any, **kwargs: Any) -> Any:
        with (
            mock.patch.object(rejection_sampler, "expand_batch_to_tokens", expanded),
            mock.patch.object(rejection_sampler, "apply_top_k_top_p", constrain),
        ):
            return forward(*args, **kwargs)

    return with_expanded


class SparqCpuWorker(SparqWorkerMixin, CPUWorker):
    """Chosen by our platform in place of vLLM's default worker; a worker class of the user's own is left alone."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; and its runner zeroes new blocks as it does on CUDA, whatever pages they are split into."""
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        if getattr(runner, "rejection_sampler", None) is not None:
            runner.rejection_sampler.forward = expanding(runner.rejection_sampler.forward)
        runner._zero_block_ids = self._zero_block_ids

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """vLLM's CPU runner takes a block for a row of a layer's cache, where a block of ours may be several rows."""
        config, layers = self.model_runner.kv_cache_config, self.vllm_config.compilation_config.static_forward_context
        groups = [group for group in config.kv_cache_groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
        caches = [layers[name].kv_cache for group in groups for name in group.layer_names if name in layers]
        for cache in {cache.data_ptr(): cache for cache in caches if isinstance(cache, torch.Tensor)}.values():
            group_kernel_blocks(cache, config.num_blocks)[block_ids] = 0

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate the KV cache as vLLM does, then put 2 MB pages under it."""
        result = super().initialize_from_config(*args, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        caches = [layer.kv_cache for layer in layers if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]
        storages = {cache.untyped_storage().data_ptr(): cache for cache in caches if cache.numel()}
        n_declined = sum(not advise_huge_pages(cache) for cache in storages.values())
        if n_declined:
            logger.info_once("no 2 MB pages for the KV cache: long contexts read up to a fifth slower")
        return result
