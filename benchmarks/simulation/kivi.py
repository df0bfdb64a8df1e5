"""KIVI as its paper defines it, simulated in plain torch: what our kivi formats are compared with.

    python -m vllm_sparq.benchmarks.simulation.kivi --bits 2 --tasks needle,recall,map --lengths 1024

Liu et al. 2024 (arXiv 2402.02750), as the authors' code has it. The prompt is computed in full precision. Then K is
quantized per channel in groups of g tokens, except for the last (S mod R) tokens, and V per token in groups of g
channels, except for the last R tokens. Nothing is packed and nothing is fast: tensors are quantized and dequantized in
place of a cache. It shares no code with `vllm_sparq.ops`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_sparq.benchmarks.quality.prompts import Wanted
from vllm_sparq.benchmarks.simulation.model import answer
from vllm_sparq.benchmarks.tasks.generated import TASKS, score
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import comma_names, comma_numbers


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Groups of x [..., g] on 2**bits even levels from their least to their largest element."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    levels: torch.Tensor = ((x - low) / step).round() * step + low
    return levels


class SimulatedCache(DynamicCache):
    """Gives back K and V as KIVI's cache would hold them, once the prompt is in."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual

    def update(self, key_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """K and V [B, G, S, D] of all tokens: exact in the step of the prompt, quantized in the steps after it."""
        keys, values = super().update(key_states, *args, **kwargs)
        if key_states.shape[2] > 1:
            return keys, values
        n_tokens = keys.shape[2]
        n_keys, n_values = n_tokens // self.residual * self.residual, max(n_tokens - self.residual, 0)
        old_keys = keys[:, :, :n_keys].transpose(2, 3).unflatten(-1, (-1, self.group))
        old_keys = rounded(old_keys, self.bits).flatten(-2).transpose(2, 3)
        old_values = rounded(values[:, :, :n_values].unflatten(-1, (-1, self.group)), self.bits).flatten(-2)
        keys, values = (
            torch.cat([old_keys, keys[:, :, n_keys:]], 2),
            torch.cat([old_values, values[:, :, n_values:]], 2),
        )
        return keys, values


def main() -> None:
    """Score the simulation, and the model without it, on the prompts of `vllm-sparq eval`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS)
    parser.add_argument("--bits", type=comma_numbers, default=[4, 2])
    parser.add_argument("--group", type=int, default=32, help="g (default: 32)")
    parser.add_argument("--residual", type=int, default=128, help="R, tokens in full precision (default: 128)")
    parser.add_argument("--tasks", type=comma_names, default=list(TASKS))
    parser.add_argument("--lengths", type=comma_numbers, default=[1024])
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    console = Console()
    for task in args.tasks:
        for length in args.lengths:
            wanted = Wanted(model=args.model, tasks=[task], lengths=[length], n=args.n, seed=args.seed)
            examples = wanted.examples(model.config.max_position_embeddings)
            for bits in (None, *args.bits):
                found = []
                for example in track(
                    examples, f"{task} at {length}, {bits or 'no'} bits", console=console, transient=True
                ):
                    cache = DynamicCache() if bits is None else SimulatedCache(bits, args.group, args.residual)
                    found.append(score(example, answer(model, tokenizer, example, cache)))
                name = "dense" if bits is None else f"KIVI-{bits}, simulated"
                console.print(f"{task:<12} {length:>6} {name:<20} {100 * fmean(found):5.1f}")


if __name__ == "__main__":
    main()
