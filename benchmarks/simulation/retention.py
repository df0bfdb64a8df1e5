"""H2O and sinks + window by their definitions, simulated in plain torch: what our evicting methods are compared with.

    vllm-sparq research retention --budget 0.5,0.25,0.125 --tasks needle,recall --lengths 1024
    vllm-sparq research retention --scores sum,mean,decayed --model smollm2-135m

Every token stays in memory; a mask per layer and KV head says who is alive. The prompt is computed densely, and each
token's score is the sum over all queries of the attention it got, averaged over the query heads of a KV head. When a
token arrives after the prompt, the newest tokens stay (the arriving one among them), of the rest those with the
highest scores (H2O, arXiv 2306.14048) or none but the first ones (sinks + window, arXiv 2309.17453, at their own
positions), and the dead stay dead. H2O ranks by the sum; beside it, by that over the queries that could see the token,
or by a sum in which attention counts half as much 128 queries later. Nothing is paged and nothing is fast. It shares
no code with `vllm_sparq.ops`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from transformers import DynamicCache

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.quality.cells import cells
from vllm_sparq.benchmarks.simulation.model import answer, load, running
from vllm_sparq.benchmarks.simulation.prompts import add_prompt_arguments, cells_of, checked, keep, line, table
from vllm_sparq.console import UsageError, comma_names, comma_shares, make_console

SCORES = ("sum", "mean", "decayed")
"""What the attention that a token got is made into."""

DECAY = 0.5 ** (1 / 128)
"""Of a query before the next, in a decayed score."""

ALL = 1e6
"""A budget, in lengths of the prompt, that no answer outgrows."""


@dataclass
class Simulation:
    """One request.

    Attributes:
        budget: share of the prompt that stays.
        by_score: heavy hitters, by one of `SCORES`; None for the newest.
        sinks: first tokens that stay.
        alive, scores: per layer, [G, S].
    """

    budget: float
    by_score: str | None
    sinks: int
    prompt_len: int = 0
    alive: dict[int, torch.Tensor] = field(default_factory=dict)
    scores: dict[int, torch.Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [1, G, H/G, T, D], k and v [1, G, S, D]; returns [1, G, H/G, T, D]."""
        q, k, v = q[0].permute(2, 0, 1, 3), k[0].transpose(0, 1), v[0].transpose(0, 1)
        n_new, n_tokens = q.shape[0], k.shape[0]
        visible = (
            torch.ones(n_new, n_tokens, dtype=torch.bool).tril(n_tokens - n_new)[:, None].expand(-1, k.shape[1], -1)
        )
        if n_new > 1:
            self.prompt_len = n_tokens
            self.alive[layer], self.scores[layer] = (
                torch.ones(k.shape[1], n_tokens, dtype=torch.bool),
                torch.zeros(1, 1),
            )
        else:
            new = torch.ones(k.shape[1], 1)
            self.alive[layer] = torch.cat([self.alive[layer], new.bool()], 1)
            self.scores[layer] = torch.cat([self.scores[layer], new * 0], 1)
            self.bury(layer)
            visible = self.alive[layer][None]
        logits = scale * torch.einsum("tghd,sgd->tghs", q, k)
        weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
        decay = DECAY if self.by_score == "decayed" else 1.0
        later = decay ** torch.arange(n_new - 1, -1, -1.0)
        got = torch.einsum("t,tgs->gs", later, weights.mean(2))
        self.scores[layer] = self.scores[layer] * decay**n_new + got
        return torch.einsum("tghs,sgd->ghtd", weights, v)[None]

    def bury(self, layer: int) -> None:
        """Leave the budget alive, the newest token included."""
        alive = self.alive[layer]
        n_kept = math.ceil(self.budget * self.prompt_len)
        positions = torch.arange(alive.shape[1])
        n_recent = n_kept // 2 if self.by_score else 1
        always = (positions < self.sinks) | (positions >= alive.shape[1] - n_recent)
        rank = self.scores[layer] if self.by_score else positions.expand_as(alive).float()
        if self.by_score == "mean":
            rank = rank / (alive.shape[1] - positions)
        rank = rank.masked_fill(always, torch.inf).masked_fill(~alive, -torch.inf)
        best = rank.sort(descending=True, stable=True).indices[:, :n_kept]
        alive &= torch.zeros_like(alive).scatter(1, best, True)


def simulate(model: Any, tokenizer: Any, example: Any, simulation: Simulation) -> str:
    """The greedy answer to one example."""
    with running(simulation):
        return answer(model, tokenizer, example, DynamicCache())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research retention`."""
    parser.description = __doc__
    add_prompt_arguments(parser)
    parser.add_argument(
        "--scores", type=comma_names, default=["sum"], help=f"of {', '.join(SCORES)}: what H2O ranks by (default: sum)"
    )
    parser.add_argument("--budget", type=comma_shares, default="0.5,0.25,0.125", help="shares of the prompt that stay")


def main(args: argparse.Namespace) -> int:
    """Score the simulations, and the model without them, on the prompts of `vllm-sparq eval`."""
    checked(args)
    if unknown := set(args.scores) - set(SCORES):
        raise UsageError(f"unknown score {min(unknown)!r}: choose from {', '.join(SCORES)}")
    model, tokenizer = load(args.model)
    console = make_console()
    records: list[dict[str, Any]] = []
    methods: dict[str, tuple[float, str | None, int]] = {DENSE: (ALL, "sum", 0)}
    for budget in args.budget:
        for by in args.scores:
            methods[f"h2o {budget:g}" + f", {by}" * (by != "sum")] = (budget, by, 0)
        methods[f"streaming {budget:g}"] = (budget, None, 4)
    for examples in cells_of(args, model.config.max_position_embeddings):
        task, length = examples[0].task, examples[0].length
        lines = []
        for name, numbers in methods.items():
            for example in track(examples, f"{task} at {length:,}, {name}", console=console, transient=True):
                lines.append(line(example, name, simulate(model, tokenizer, example, Simulation(*numbers))))
        records += cells(lines)
    keep(args, "retention_simulation", records)
    console.print(table(records))
    return 0
