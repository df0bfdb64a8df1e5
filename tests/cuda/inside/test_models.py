"""Block sizes of models with sliding windows are ours, and budgets shrink under pressure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_models import gemma3
from tests.engine.support import Prompts


@pytest.fixture(scope="module")
def with_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with random weights: every third layer sees everything."""
    return gemma3(
        tmp_path_factory.mktemp("gemma3"),
        seed=3,
        full=[False, False, True],
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.mark.parametrize("backend", ["sparq", "kivi"])
def test_blocks_of_hybrid_models_are_ours(engine: Any, backend: str, with_windows: Path) -> None:
    """Left to itself vLLM takes the smallest size that all backends can, 16: too small for KIVI, slow for SparQ."""
    small = dict(model=str(with_windows), skip_tokenizer_init=True, max_model_len=512, kv_cache_memory_bytes=32 << 20)
    with engine(backend, {}, **small) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        layers = worker.vllm_config.compilation_config.static_forward_context
        (ours,) = (layer.impl for layer in layers.values() if hasattr(layer.impl, "options"))
        prompt = [i % 500 + 3 for i in range(100)]  # more than a window
        assert len(Prompts.answers(llm, [prompt], 4)[0]) == 4
        assert (
            ours._pages.layout.block_size == {"sparq": 128, "kivi": 64}[backend]
        )  # 64: pages as large as those beside


def test_budgets_shrink_under_pressure(engine: Any, prompts: Any) -> None:
    """The pool is full before the answers are: budgets shrink instead of a request being preempted."""
    options = {"budget": 512, "recent": 32, "pressure": "evict", "retention": "heavy_hitter"}
    some = [prompts.of_length(n) for n in (300, 350, 400)]
    small: dict[str, Any] = dict(max_model_len=1024, block_size=32, num_gpu_blocks_override=40, disable_log_stats=False)
    with engine("h2o", options, **small) as llm:
        answers = prompts.answers(llm, some, 200)
        metrics = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    assert [len(answer) for answer in answers] == [200] * 3
    assert metrics["vllm:num_preemptions"] == 0
