"""What eviction does and what requests choose, in vLLM's own metrics: Prometheus counters, and the log of `vllm serve`.

    vllm:sparq_evicted_tokens_total        tokens that finished requests no longer held, per KV head
    vllm:sparq_saved_blocks_total          KV blocks that they did without
    vllm:sparq_saved_bytes_total           the bytes of these
    vllm:sparq_blocks_taken_total          blocks that running requests gave up under pressure
    vllm:sparq_preemptions_avoided_total   times that this spared a request from being preempted
    vllm:sparq_dense_requests_total        requests that asked to be read densely (`attention_backends.choices`)
    vllm:sparq_tuned_requests_total        requests that chose how much is read of them

The first three follow from the lengths of a finished request, as `vllm_sparq.retention` has it. The others are known
to the scheduler alone, which counts in a small file (`vllm_sparq.counters`). Where several front ends serve the same
engines, each publishes the requests that it finished, and of the file what it found first. Under data parallelism over
several nodes the file of an engine on another host is out of reach: for such an engine these four stay 0.

A stat logger of a plugin makes vLLM collect its statistics even under `--disable-log-stats` (it then logs none itself):
vLLM looks for such loggers before it knows which backend it will run.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_sparq.counters import Counters

logger = init_logger("vllm.sparq")

FROM_LENGTHS = {
    "evicted_tokens": "Tokens that finished requests no longer held, per KV head.",
    "saved_blocks": "KV blocks that finished requests did without.",
    "saved_bytes": "Bytes of KV cache that finished requests did without.",
}
FROM_SCHEDULER = {
    "blocks_taken": "KV blocks that running requests gave up under pressure.",
    "preemptions_avoided": "Times that a block given up spared a request from being preempted.",
    "dense_requests": "Requests that asked to be read densely.",
    "tuned_requests": "Requests that chose how much is read of them.",
}
ELSEWHERE = "Stays 0 for an engine on another host than its front end."
"""What `/metrics` says of those that are `FROM_SCHEDULER`."""


class SparqStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`; silent where nothing is evicted or chosen."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.vllm_config, self.engine_index = vllm_config, engine_index
        self.totals = dict.fromkeys((*FROM_LENGTHS, *FROM_SCHEDULER), 0)
        self.logged = dict(self.totals)
        self._prometheus: dict[str, Any] | None = None
        self._counters = Counters.of(vllm_config, engine_index)
        self.retention, self.block_bytes = _retention_of(vllm_config)
        self.takes_choices = _takes_choices(vllm_config)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """After each step."""
        if self.retention is None and not self.takes_choices:
            return
        before = dict(self.totals)
        if self.retention is not None and iteration_stats is not None:
            for request in iteration_stats.finished_requests:
                self._finished(request.num_prompt_tokens, request.num_generation_tokens)
        for name, n_new in self._counters.take().items():
            self.totals[name] += n_new
        if self._prometheus is None:
            self._prometheus = self._register()
        for name, total in self.totals.items():
            self._prometheus[name].inc(max(total - before[name], 0))

    def _finished(self, n_prompt: int, n_generated: int) -> None:
        assert self.retention is not None
        n_tokens = n_prompt + max(n_generated - 1, 0)  # the last one is never cached
        held = self.retention.arrival(n_tokens, n_prompt).held
        n_blocks = -(-n_tokens // self.retention.block_size) - -(-held // self.retention.block_size)
        self.totals["evicted_tokens"] += n_tokens - held
        self.totals["saved_blocks"] += n_blocks
        self.totals["saved_bytes"] += n_blocks * self.block_bytes

    def _register(self) -> dict[str, Any]:
        from prometheus_client import REGISTRY, Counter

        names: Any = REGISTRY._names_to_collectors
        labels = [self.vllm_config.model_config.served_model_name, str(self.engine_index)]
        found = {}
        texts = FROM_LENGTHS | {name: f"{text} {ELSEWHERE}" for name, text in FROM_SCHEDULER.items()}
        for name, text in texts.items():
            full = f"vllm:sparq_{name}"
            counter = names.get(f"{full}_total") or Counter(full, text, labelnames=["model_name", "engine"])
            found[name] = counter.labels(*labels)
        return found

    def log(self) -> None:
        """At vLLM's interval, if anything happened since the last time."""
        new = {name: total - self.logged[name] for name, total in self.totals.items()}
        if not any(new.values()):
            return
        self.logged = dict(self.totals)
        if new["dense_requests"] or new["tuned_requests"]:
            logger.info(
                "sparq: %d requests asked to be read densely, %d chose how much is read of them",
                new["dense_requests"],
                new["tuned_requests"],
            )
        if not any(new[name] for name in FROM_LENGTHS) and not new["preemptions_avoided"]:
            return
        logger.info(
            "sparq: finished requests did without %d tokens per KV head, %d KV blocks (%.1f MB)%s",
            new["evicted_tokens"],
            new["saved_blocks"],
            new["saved_bytes"] / 1e6,
            f"; {new['preemptions_avoided']} preemptions avoided by taking {new['blocks_taken']} blocks"
            if new["preemptions_avoided"]
            else "",
        )

    def log_engine_initialized(self) -> None:
        """vLLM's own line says enough."""


def _takes_choices(vllm_config: Any) -> bool:
    """Whether requests may choose what is read of them."""
    from vllm_sparq.attention_backends.engine import PagedEngine

    engine = PagedEngine.of(vllm_config)
    return engine is not None and engine.reads_sparsely


def _retention_of(vllm_config: Any) -> tuple[Any, int]:
    """Numbers of the engine, and bytes of a block over all layers; (None, 0) where nothing is evicted."""
    from vllm_sparq.attention_backends.engine import PagedEngine, heads_of

    model = vllm_config.model_config
    engine = PagedEngine.of(vllm_config)
    if model is None or engine is None or engine.retention is None:
        return None, 0
    n_kv_heads = model.get_total_num_kv_heads()
    layout = engine.layout(heads_of(model, vllm_config.parallel_config), model.dtype)
    kinds = getattr(model.hf_text_config, "layer_types", None) or []
    n_layers = kinds.count("full_attention") or model.hf_text_config.num_hidden_layers
    return engine.retention, layout.page_bytes * n_kv_heads * n_layers
