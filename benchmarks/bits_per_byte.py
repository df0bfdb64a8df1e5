"""What quantized blocks cost a language model: bits per byte of text, through the engine.

    python -m vllm_sparq.benchmarks.bits_per_byte --methods int8,int4,kivi4,kivi2

A row of a prompt sees every block before its own as codes, just as a decoded token does, so vLLM's prompt
log-probabilities measure the formats as they are served. They do not measure SparQ, which reads prompts densely.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_sparq.benchmarks.quality import Setting, settings
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.cli import UsageError, comma_names


def windows(model: Path, text: str, n_tokens: int, n_windows: int) -> list[list[int]]:
    """The first ``n_windows`` pieces of the text, ``n_tokens`` each.

    Raises:
        UsageError: the text is too short.
    """
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    if len(ids) < n_tokens * n_windows:
        raise UsageError(f"the text has {len(ids):,} tokens: {n_windows} windows of {n_tokens} need more")
    return [ids[i * n_tokens : (i + 1) * n_tokens] for i in range(n_windows)]


def measure(setting: Setting, model: Path, dtype: str, prompts: list[list[int]]) -> list[float]:
    """Bits per byte of each window, its first token left out. In a process of its own."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = dict(dtype=dtype, enforce_eager=True, enable_prefix_caching=False)
    options |= dict(attention_backend=setting.backend, additional_config={"sparq": setting.options})
    llm = LLM(str(model), kv_cache_memory_bytes=1 << 30, disable_log_stats=True, **options)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    tokenizer, found = llm.get_tokenizer(), []
    for prompt, output in zip(prompts, llm.generate(requests, params, use_tqdm=True), strict=True):
        steps: Any = output.prompt_logprobs  # of a prompt's first token there is none
        nats = -sum(step[token].logprob for token, step in zip(prompt[1:], steps[1:], strict=True))
        found.append(nats / math.log(2) / len(tokenizer.decode(prompt[1:]).encode()))
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--methods", type=comma_names, default=["int8", "int4", "kivi4", "kivi2"])
    parser.add_argument("--text", type=Path, help="a text file (default: held-out text of the bundled model's corpus)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--n", type=int, default=64, help="windows (default: 64)")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.text is None:
        from vllm_sparq.benchmarks.tiny_model.corpus import documents

        text = "\n\n".join(documents(8 * args.length * args.n, held_out=True))
    else:
        text = args.text.read_text(encoding="utf-8")
    prompts = windows(args.model, text, args.length, args.n)
    table = Table(title=f"bits per byte ± standard error of the difference, {args.n} windows of {args.length} tokens")
    for column in ("method", "bits per byte", "beside dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    context = multiprocessing.get_context("spawn")
    dense: list[float] = []
    for setting in settings(args.methods, ["8"], {}):
        with context.Pool(1) as pool:
            found = pool.apply(measure, (setting, args.model, args.dtype, prompts))
        dense = dense or found
        differences = [a - b for a, b in zip(found, dense, strict=True)]
        mean = math.fsum(differences) / len(differences)
        error = math.sqrt(math.fsum((x - mean) ** 2 for x in differences) / (len(differences) - 1) / len(differences))
        table.add_row(setting.name, f"{math.fsum(found) / len(found):.4f}", f"{mean:+.4f} ± {error:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
