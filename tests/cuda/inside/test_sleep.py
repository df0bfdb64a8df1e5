"""vLLM's sleep mode: an engine that has slept answers as before, over a cache whose bytes are anything."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from tests.cuda.pretend.device import always
from tests.cuda.pretend.graphs import Graph
from tests.engine.support import EXACT

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparq": ("sparq", {**EXACT["sparse"], "format": "int8"}),
    "h2o": ("h2o", {"budget": 96, "recent": 32}),
}


class Allocator:
    """`CuMemAllocator`, as far as starting asks for it."""

    get_current_usage = staticmethod(always(0))
    use_memory_pool = staticmethod(lambda *_, **__: contextlib.nullcontext())


class Asleep:
    """`SleepModeBackend` that keeps weights and addresses; the bytes of the cache are NaN to whoever reads them."""

    def __init__(self, caches: list[torch.Tensor]) -> None:
        self.caches = caches

    def suspend(self, level: int = 1) -> None:
        for cache in self.caches:
            cache.view(torch.uint8).fill_(0xFF)

    def resume(self, tags: list[str] | None = None) -> None:
        pass


@pytest.mark.parametrize("name", BACKENDS)
def test_it_answers_as_before(name: str, engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation import cudagraph_pool
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    for module in (cudagraph_pool, gpu_worker):
        monkeypatch.setattr(module, "get_mem_allocator_instance", always(Allocator))
    monkeypatch.setattr(type(current_platform), "is_cumem_allocator_available", always(True))
    backend, options = BACKENDS[name]
    small: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=32 << 20, enable_prefix_caching=True)
    with engine(backend, options, enable_sleep_mode=True, **small) as llm:
        some = [prompts.of_length(n) for n in (40, 300)]
        answers = prompts.answers(llm, some, 20)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        worker._sleep_mode_backend = Asleep([layer.kv_cache for layer in layers])
        llm.sleep(level=1)
        llm.wake_up()
        before = Graph.n_replays
        assert prompts.answers(llm, some, 20) == answers
        assert Graph.n_replays - before >= 19
