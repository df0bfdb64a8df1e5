"""Scores a model on the generated tasks over a range of lengths: plain transformers, greedy, on the CPU.

    python -m vllm_sparq.benchmarks.tiny_model.score

prints a table of mean scores with standard errors; any folder or name that `AutoModelForCausalLM` takes will do.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.benchmarks.tiny_model.corpus import documents

LENGTHS = (256, 512, 1024, 2048, 4000)  # prompt tokens; the answer has to fit into 4,096 as well
SEED = 1_000_000  # far from the small seeds of demos and tests


def load(path: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to complete prompts."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: tasks.Example) -> str:
    """The greedy completion of an example's prompt, ended by the example's stop strings or number of tokens."""
    ids = torch.tensor([tokenizer(example.prompt).input_ids])
    out = model(ids, use_cache=True, logits_to_keep=1)
    new: list[int] = []
    text = ""
    while True:
        new.append(int(out.logits[0, -1].argmax()))
        text = str(tokenizer.decode(new))
        ends = [text.index(stop) for stop in example.stop if stop in text]
        if ends:
            return text[: min(ends)]
        if len(new) == example.max_tokens:
            return text
        out = model(torch.tensor([new[-1:]]), past_key_values=out.past_key_values, use_cache=True)


def score_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, *, n: int, n_tokens: int, seed: int = SEED
) -> list[float]:
    """Scores of `n` examples of about `n_tokens` tokens, depths drawn at random."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    drawn = tasks.make_examples(task, n, n_tokens=n_tokens, count_tokens=count_tokens, seed=seed)
    return [tasks.score(example, complete(model, tokenizer, example)) for example in drawn]


@torch.inference_mode()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, n_tokens: int = 1024
) -> float:
    """Cross-entropy of the texts' first `n_tokens` tokens, per byte of text; shorter texts are left out."""
    bits, n_bytes = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[:n_tokens]])
        if ids.shape[1] == n_tokens:
            losses = F.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum")
            bits += losses.item() / math.log(2)
            n_bytes += len(str(tokenizer.decode(ids[0, 1:])).encode())
    if not n_bytes:
        raise ValueError(f"none of the {len(texts)} texts has {n_tokens} tokens")
    return bits / n_bytes


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, Laplace-smoothed so that a row of equal scores has an error above 0."""
    n = len(scores)
    mean = sum(scores) / n
    spread = sum((s - mean) ** 2 for s in scores) + (1 - mean) ** 2 + mean**2
    return mean, math.sqrt(spread / (n + 1) / n)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(WEIGHTS), help="default: the bundled weights")
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="prompt tokens")
    parser.add_argument("--n", type=int, default=50, help="examples per cell")
    parser.add_argument("--seed", type=int, default=SEED, help="of the first example")
    parser.add_argument("--text", action="store_true", help="bits per byte on held-out text of this machine as well")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    model, tokenizer = load(args.model, getattr(torch, args.dtype))
    print(f"| task | {' | '.join(map(str, args.lengths))} |")
    print("|---" * (len(args.lengths) + 1) + "|")
    begun = time.perf_counter()
    for task in args.tasks:
        print(f"| {task} |", end="", flush=True)
        for n_tokens in args.lengths:
            scores = score_task(model, tokenizer, task, n=args.n, n_tokens=n_tokens, seed=args.seed)
            print(" {:.2f} ± {:.2f} |".format(*mean_and_error(scores)), end="", flush=True)
        print()
    if args.text:
        held_out = [text for text in documents(1_000_000, held_out=True) if len(text) > 5000][:64]
        print(f"\nbits per byte on {len(held_out)} held-out documents: {bits_per_byte(model, tokenizer, held_out):.3f}")
    print(f"\nn = {args.n} per cell, {args.dtype}, seeds from {args.seed}, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
