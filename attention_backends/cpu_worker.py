"""vLLM's CPU worker with what our backends need from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_sparq.attention_backends.worker import SparqWorkerMixin
from vllm_sparq.ops import native
from vllm_sparq.scheduler.spec import is_ours

logger = init_logger("vllm.sparq")


class SparqCpuWorker(SparqWorkerMixin, CPUWorker):
    """Chosen by our platform in place of vLLM's default worker; a worker class of the user's own is left alone."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; and its runner no longer empties new blocks of layers of ours.

        It takes a block for a row of a layer's cache, where a block of ours may be several pages and each a row. Our
        layers need no zeros: nothing is read that was not written.
        """
        super().load_model(*args, **kwargs)
        runner: Any = self.model_runner
        zero = runner._zero_block_ids

        def zero_block_ids(block_ids: list[int]) -> None:
            config = runner.kv_cache_config
            groups = [group for group in config.kv_cache_groups if not is_ours(group.kv_cache_spec)]
            runner.kv_cache_config = replace(config, kv_cache_groups=groups)
            try:
                zero(block_ids)
            finally:
                runner.kv_cache_config = config

        runner._zero_block_ids = zero_block_ids

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate the KV cache as vLLM does, then put 2 MB pages under it."""
        result = super().initialize_from_config(*args, **kwargs)
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        caches = [layer.kv_cache for layer in layers if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)]
        storages = {cache.untyped_storage().data_ptr(): cache for cache in caches if cache.numel()}
        n_declined = sum(not native.advise_huge_pages(cache) for cache in storages.values())
        if n_declined:
            logger.info_once("no 2 MB pages for the KV cache: long contexts read up to a fifth slower")
        return result
