"""KV cache specs: how vLLM learns the true size of our pages."""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparq.layout import PageLayout


def page_spec(spec: FullAttentionSpec, layout: PageLayout) -> FullAttentionSpec:
    """``spec`` with our pages in place of vLLM's: raw bytes, ``layout.bytes_per_token`` for each token and KV head.

    Everything vLLM derives from a spec (the number of blocks, maximum concurrency, the start-up memory check) follows.
    """
    return replace(spec, dtype=torch.uint8, state_content_bytes=layout.bytes_per_token)
