"""Layers that attend within chunks of their context (Llama 4) run on vLLM's own backend: a chunk bounds what they read.

vLLM builds such a layer over whatever backend the others have, and tells neither backend nor platform that it does. So
while a model is built, these layers ask as layers with a sliding window do, which our platform hands to vLLM's own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from vllm.model_executor.layers.attention import chunked_local_attention

from vllm_sparq.attention_backends.engine import selected_backends


def chunks_elsewhere(vllm_config: Any) -> AbstractContextManager[Any]:
    """Models of this engine that are built meanwhile have their layers of chunks on vLLM's own backend."""
    if not selected_backends(vllm_config):
        return nullcontext()
    module: Any = chunked_local_attention
    return mock.patch.object(module, "get_attn_backend", partial(module.get_attn_backend, has_sliding_window=True))
