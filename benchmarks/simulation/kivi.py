"""KIVI as its paper defines it, simulated in plain torch: what our kivi formats are compared with.

    vllm-sparq research kivi --bits 2 --tasks needle,recall,map --lengths 1024

Liu et al. 2024 (arXiv 2402.02750), as the authors' code has it. The prompt is computed in full precision. Then K is
quantized per channel in groups of g tokens, except for the last (S mod R) tokens, and V per token in groups of g
channels, except for the last R tokens. Nothing is packed and nothing is fast: tensors are quantized and dequantized in
place of a cache. It shares no code with `vllm_sparq.ops`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.quality.cells import cells
from vllm_sparq.benchmarks.simulation.model import answer, load_plain
from vllm_sparq.benchmarks.simulation.prompts import add_prompt_arguments, cells_of, checked, keep, line, table
from vllm_sparq.console import comma_numbers, make_console, natural, positive


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research kivi`."""
    parser.description = __doc__
    add_prompt_arguments(parser)
    parser.add_argument("--bits", type=comma_numbers, default=[4, 2], help="of the codes (default: 4,2)")
    parser.add_argument("--group", type=positive, default=32, help="g (default: 32)")
    parser.add_argument("--residual", type=natural, default=128, help="R, tokens in full precision (default: 128)")


def main(args: argparse.Namespace) -> int:
    """Score the simulation, and the model without it, on the prompts of `vllm-sparq eval`."""
    checked(args)
    model, tokenizer = load_plain(args.model)
    console = make_console()
    records: list[dict[str, Any]] = []
    for examples in cells_of(args, model.config.max_position_embeddings):
        task, length = examples[0].task, examples[0].length
        lines = []
        for bits in (None, *args.bits):
            name = DENSE if bits is None else f"KIVI-{bits}"
            for example in track(examples, f"{task} at {length:,}, {name}", console=console, transient=True):
                cache = DynamicCache() if bits is None else SimulatedCache(bits, args.group, args.residual)
                lines.append(line(example, name, answer(model, tokenizer, example, cache)))
        records += cells(lines)
    keep(args, "kivi_simulation", records, group=args.group, residual=args.residual)
    console.print(table(records))
    return 0
