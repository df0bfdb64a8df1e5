"""The same questions to dense attention and to methods of ours: `python examples/compare_methods.py [MODEL]`.

A sketch of what `vllm-sparq eval` does with intervals, more tasks and records.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "sparq": ("sparq", {"dense_below": 0}),
    "kivi": ("kivi", {}),
    "sparq over int4": ("sparq", {"format": "int4", "dense_below": 0}),
    "h2o, half of the prompt": ("h2o", {"budget": 0.5}),
}
"""Name -> `--attention-backend` and options; None is vLLM's own choice."""

LENGTH, N_QUESTIONS = 900, 6


@contextlib.contextmanager
def engine(model: str, backend: str | None, options: dict[str, Any]) -> Iterator[Any]:
    """An engine in this process, closed on leaving."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    ours = {} if backend is None else dict(attention_backend=backend, additional_config={"sparq": options})
    llm = LLM(model, enforce_eager=True, max_model_len=2048, kv_cache_memory_bytes=64 << 20, **ours)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def main() -> None:
    """A line per method."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from vllm_sparq.benchmarks.tasks.generated import make_example
    from vllm_sparq.benchmarks.tiny_model import WEIGHTS

    model = sys.argv[1] if len(sys.argv) > 1 else str(WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    examples = [make_example("recall", n_tokens=LENGTH, count_tokens=count, seed=seed) for seed in range(N_QUESTIONS)]
    params = SamplingParams(temperature=0, max_tokens=8)
    for name, (backend, options) in METHODS.items():
        with engine(model, backend, options) as llm:
            outputs = llm.generate([example.prompt for example in examples], params, use_tqdm=False)
            capacity = llm.llm_engine.vllm_config.cache_config
            n_tokens = capacity.num_gpu_blocks * capacity.block_size
        answers = zip(examples, outputs, strict=True)
        right = sum(output.outputs[0].text.startswith(example.answer) for example, output in answers)
        print(f"{name:24} {right} of {N_QUESTIONS} right   {n_tokens:7,} tokens in 64 MiB of KV cache", flush=True)


if __name__ == "__main__":
    main()
