"""How much an engine's KV cache holds, by vLLM's own computation over the model's own layers; no weights are loaded.

`capacity` builds the model on torch's meta device, where tensors have shapes and no memory, asks each layer for its KV
cache spec as a worker does, and gives these to the functions from which vLLM's "maximum concurrency" comes. So its
numbers are the ones that `vllm serve` logs for the same configuration and the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.worker.utils import customize_attention_spec

from vllm_sparq.attention_backends.chunks import chunks_elsewhere
from vllm_sparq.attention_backends.engine import selected_backends
from vllm_sparq.attention_backends.found import layers_by_backend, silence_refusal
from vllm_sparq.attention_backends.keys import biased_projections
from vllm_sparq.attention_backends.refusals import CANNOT_START
from vllm_sparq.attention_backends.shared_pages import share_pages
from vllm_sparq.scheduler.manager import register_specs
from vllm_sparq.scheduler.spec import is_ours, know_each_other


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers of a worker that share block tables.

    Attributes:
        kind: the name of their KV cache spec's class.
        ours: whether they are on one of our backends.
        n_layers: how many there are.
        block_size: tokens per block.
        page_tokens: tokens per page of ours, of which a block may hold several.
        page_bytes: of one block in one layer, padding included.
        padding_bytes: bytes of these that hold nothing.
        staging_pages: of these, blocks in which the newest one waits in full precision.
        pages_per_request: blocks that one request of the model's full length holds, ours staged tokens included.
    """

    kind: str
    ours: bool
    n_layers: int
    block_size: int
    page_tokens: int
    page_bytes: int
    padding_bytes: int
    staging_pages: int
    pages_per_request: int

    @property
    def bytes_per_request(self) -> int:
        """Of one request of the model's full length, in these layers."""
        return self.n_layers * self.pages_per_request * self.page_bytes


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a worker's KV cache of some bytes holds.

    Attributes:
        memory_bytes: of the cache.
        max_model_len: tokens of the requests that are counted.
        max_concurrency: how many of these fit at once; vLLM's "maximum concurrency".
        n_tokens: their tokens; vLLM's "KV cache size".
        n_blocks: blocks of the pool, which all groups share.
        groups: the layers that have a KV cache.
        backends: name of a backend -> how many layers run on it.
        n_biased_keys: projections of the model that add a bias to K.
    """

    memory_bytes: int
    max_model_len: int
    max_concurrency: float
    n_tokens: int
    n_blocks: int
    groups: tuple[CacheGroup, ...]
    backends: dict[str, int]
    n_biased_keys: int


def capacity(vllm_config: Any, memory_bytes: int) -> Capacity:
    """What a KV cache of ``memory_bytes`` on each worker holds.

    Args:
        vllm_config: from ``EngineArgs(...).create_engine_config()``, for any backend, ours or not; made for this call,
            since the layers that are built leave their marks in it.
        memory_bytes: as for ``--kv-cache-memory-bytes``; it need not hold a whole request.

    Raises:
        ValueError: the engine cannot be served by our backends, or the model is cut into stages.
    """
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("capacity is that of a whole model: leave --pipeline-parallel-size out")
    register_specs()
    specs, n_biased_keys = _built(vllm_config)
    groups = planning().get_kv_cache_groups(vllm_config, dict(specs))
    config = planning().get_kv_cache_config_from_groups(vllm_config, groups, memory_bytes)
    config = kv_cache_utils.generate_scheduler_kv_cache_config([config])
    n_tokens, max_concurrency = kv_cache_utils.get_kv_cache_capacity(vllm_config, config)
    return Capacity(
        memory_bytes=memory_bytes,
        max_model_len=vllm_config.model_config.max_model_len,
        max_concurrency=max_concurrency,
        n_tokens=n_tokens,
        n_blocks=config.num_blocks,
        groups=tuple(_group(group, vllm_config) for group in config.kv_cache_groups),
        backends=layers_by_backend(vllm_config),
        n_biased_keys=n_biased_keys,
    )


def planning() -> Any:
    """The module in which vLLM groups layers and plans their blocks: one of its own from 0.33 on."""
    name = "vllm.v1.core.kv_cache_planning"
    return importlib.import_module(name) if importlib.util.find_spec(name) else kv_cache_utils


def _group(group: Any, vllm_config: Any) -> CacheGroup:
    spec = group.kv_cache_spec
    page_bytes = spec.page_size_bytes
    return CacheGroup(
        kind=type(spec).__name__,
        ours=is_ours(spec),
        n_layers=len(group.layer_names),
        block_size=spec.block_size,
        page_tokens=getattr(spec, "page_tokens", spec.block_size),
        page_bytes=page_bytes,
        padding_bytes=page_bytes - getattr(spec, "unpadded_page_size_bytes", page_bytes),
        staging_pages=getattr(spec, "n_staging_pages", 0),
        pages_per_request=-(-spec.max_memory_usage_bytes(vllm_config) // page_bytes),
    )


def layer_specs(vllm_config: Any) -> dict[str, KVCacheSpec]:
    """The KV cache spec of every layer that has one, as a worker of this engine reports them.

    Raises:
        ValueError: no layer runs on the backend of ours that was selected.
    """
    return _built(vllm_config)[0]


def _built(vllm_config: Any) -> tuple[dict[str, KVCacheSpec], int]:
    """`layer_specs`, and how many projections of the model that is built for them add a bias to K."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    with _one_rank(), set_current_vllm_config(vllm_config):
        ropes = set(_ROPE_DICT)
        try:
            with set_default_torch_dtype(model.dtype), torch.device("meta"), chunks_elsewhere(vllm_config):
                n_biased_keys = biased_projections(initialize_model(vllm_config))
            current_platform.update_block_size_for_backend(vllm_config)  # as executors do
        finally:
            for rope in set(_ROPE_DICT) - ropes:  # vLLM would give these, without their tables, to the next model
                del _ROPE_DICT[rope]
        refusal = silence_refusal(vllm_config, layers_by_backend(vllm_config))
        if refusal is not None and selected_backends(vllm_config):
            raise ValueError(CANNOT_START + refusal)
        layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        specs: dict[str, KVCacheSpec] = {}
        for name, layer in layers.items():
            spec = (
                None if getattr(layer, "kv_sharing_target_layer_name", None) else layer.get_kv_cache_spec(vllm_config)
            )
            if isinstance(spec, AttentionSpec):  # built as if there were one rank
                spec = replace(spec, num_kv_heads=max(1, spec.num_kv_heads // parallel.tensor_parallel_size))
                spec = customize_attention_spec(layer.get_attn_backend(), spec)
            if spec is not None:
                specs[name] = spec
        if selected_backends(vllm_config):
            specs = know_each_other(share_pages(specs, vllm_config, lambda name: layers[name].get_attn_backend()))
        names = [layout.name for layout in get_supported_kv_cache_layouts(_backends(layers, specs))]
        layout = resolve_kv_cache_layout(vllm_config, [names], specs.values())
        vllm_config.cache_config.kv_cache_layout = layout.name
    return specs, n_biased_keys


def _backends(layers: dict[str, Any], specs: dict[str, KVCacheSpec]) -> list[Any]:
    return [layers[name].get_attn_backend() for name in specs]


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """The process groups that vLLM's layers ask for: those of an engine in this process, else of one rank."""
    state: Any = parallel_state
    if state.model_parallel_is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        try:
            with set_current_vllm_config(VllmConfig()):  # not the engine's, which may speak of more ranks
                state.init_distributed_environment(1, 0, store, 0, backend="gloo")
                state.ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            state.destroy_model_parallel()
            state.destroy_distributed_environment()
