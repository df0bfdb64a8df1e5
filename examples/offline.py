"""Answers from `vllm.LLM` with SparQ over int4 blocks: `python examples/offline.py [MODEL]`."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

BUNDLED = Path(__file__).parents[1] / "benchmarks" / "tiny_model" / "weights"


def prompt(name: str, key: int) -> str:
    """A fact, two hundred sentences that say nothing, and a question; the bundled model knows this form."""
    filler = random.Random(key)
    rest = (
        f"The {filler.choice(['old', 'young'])} {filler.choice(['miller', 'baker'])} hid a lantern." for _ in range(200)
    )
    return f"The key of {name} is {key}. {' '.join(rest)} The key of {name} is"


def main() -> None:
    """Start an engine, ask it, and show that its layers run our attention."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(BUNDLED)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process starts faster
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        attention_backend="sparq",
        additional_config={"sparq": {"format": "int4", "compression": 8}},
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=128 << 20,
    )
    questions = [prompt("balu", 48213), prompt("mira", 90071)]
    for output in llm.generate(questions, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False):
        print(f"{len(output.prompt_token_ids)} tokens ... {output.prompt[-20:]!r} -> {output.outputs[0].text!r}")
    report = llm.collective_rpc("attention_report")[0]
    print("layers:", {layer["impl"] for layer in report.values()})


if __name__ == "__main__":
    main()
