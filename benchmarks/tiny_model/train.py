"""Trains the bundled model from scratch on one CPU core.

    OMP_NUM_THREADS=1 python -m vllm_sparq.benchmarks.tiny_model.train --out FOLDER

The schedule counts steps, every step draws its rows from the seed and its number, and a run that was interrupted
goes on from FOLDER/checkpoint.pt as if nothing had happened. It may go on with another number of steps, which
stretches or shortens what is left of the schedule.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from vllm_sparq.benchmarks.tiny_model.corpus import documents
from vllm_sparq.benchmarks.tiny_model.model import Config, Model, save_model
from vllm_sparq.benchmarks.tiny_model.rows import Batch, RowMaker
from vllm_sparq.benchmarks.tiny_model.start import structured_start
from vllm_sparq.benchmarks.tiny_model.tokenizer import save_tokenizer, train_tokenizer

Entry = TypeVar("Entry")

# From which fraction of the training on rows are of which lengths, in tokens, or of which kinds.
LENGTHS = {
    0.0: (64, 128),
    0.12: (128, 256),
    0.35: (128, 256, 512),
    0.6: (256, 512, 1024),
    0.88: (512, 1024, 2048),
}
MIXTURES = {
    0.0: {"facts": 0.45, "copy": 0.35, "map": 0.2},
    0.04: {"facts": 0.5, "copy": 0.25, "map": 0.1, "lm": 0.15},
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result, besides the text found on the machine."""

    n_steps: int = 4500
    tokens_per_step: int = 2048
    learning_rate: float = 6e-4  # higher rates destroy the start
    n_warmup: int = 150
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    corpus_bytes: int = 11_000_000
    seed: int = 0


def at_fraction(table: Mapping[float, Entry], fraction: float) -> Entry:
    """The last entry of `table` that has begun at `fraction`."""
    return [value for start, value in table.items() if start <= fraction][-1]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay over the last half."""
    warm = min(1.0, (step + 1) / recipe.n_warmup)
    left = min(1.0, 2 * (1 - step / recipe.n_steps))
    return recipe.learning_rate * warm * left


def draw_batch(maker: RowMaker, step: int, recipe: Recipe, config: Config) -> Batch:
    """The rows of one step, a function of the seed and the step alone."""
    rng = random.Random(f"{recipe.seed} {step}")
    fraction = step / recipe.n_steps
    n_tokens = rng.choice(at_fraction(LENGTHS, fraction))
    return maker.batch(
        rng,
        n_rows=recipe.tokens_per_step // n_tokens,
        n_tokens=n_tokens,
        mixture=at_fraction(MIXTURES, fraction),
        max_positions=config.max_position_embeddings,
    )


def losses(model: Model, batch: Batch) -> tuple[Tensor, float, float]:
    """The weighted loss to minimise; loss and accuracy on the predictable tokens alone."""
    where = torch.zeros_like(batch.weights, dtype=torch.bool)
    where[:, :-1] = batch.weights[:, 1:] > 0
    targets, weights = batch.ids[:, 1:][where[:, :-1]], batch.weights[:, 1:][where[:, :-1]]
    logits = model.logits(batch.ids, batch.positions, where)
    each = F.cross_entropy(logits, targets, reduction="none")
    sure = weights == 1
    if not sure.any():
        return (each * weights).sum() / weights.sum(), float("nan"), float("nan")
    right = (logits.detach().argmax(-1) == targets)[sure].float().mean().item()
    return (each * weights).sum() / weights.sum(), each.detach()[sure].mean().item(), right


class Trainer:
    """Model, optimiser and the step they have reached."""

    def __init__(self, config: Config, recipe: Recipe, maker: RowMaker) -> None:
        self.config, self.recipe, self.maker = config, recipe, maker
        self.model = Model(config, structured_start(config, seed=recipe.seed))
        self.weights = list(self.model.parameters.values())
        decayed = [p for p in self.weights if p.ndim > 1]
        kept = [p for p in self.weights if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            fused=True,
        )
        self.step = 0

    def train_step(self) -> tuple[float, float, float]:
        """One update; returns loss, and loss and accuracy on predictable tokens."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        loss, sure_loss, right = losses(self.model, draw_batch(self.maker, self.step, self.recipe, self.config))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.weights, self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        return loss.item(), sure_loss, right

    def save(self, folder: Path) -> None:
        """Write the checkpoint to go on from, and the model as it stands."""
        state = {
            "recipe": vars(self.recipe),
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.model.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, folder / "checkpoint.partial")
        (folder / "checkpoint.partial").rename(folder / "checkpoint.pt")
        save_model(self.config, self.model.parameters, folder)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint of the same recipe, save for its number of steps."""
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        if state["recipe"] | {"n_steps": self.recipe.n_steps} != vars(self.recipe):
            raise ValueError(f"{folder} was trained with {state['recipe']}, not with {vars(self.recipe)}")
        for name, p in self.model.parameters.items():
            p.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def prepare(folder: Path, recipe: Recipe, config: Config) -> RowMaker:
    """Read the text, train the tokenizer unless the folder has one, and tokenise."""
    texts = documents(recipe.corpus_bytes, held_out=False)
    file = folder / "tokenizer.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = train_tokenizer(texts, seed=recipe.seed)
        save_tokenizer(tokenizer, folder, max_positions=config.max_position_embeddings)
    ids = [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    corpus = np.concatenate(ids)
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} bytes, {len(corpus):,} tokens", flush=True)
    return RowMaker(tokenizer, corpus)


def train(
    folder: Path, recipe: Recipe, *, stop_after: int | None = None, checkpoint_every: int = 250, log_every: int = 25
) -> None:
    """Train to the recipe's last step or step `stop_after`, logging means over `log_every` steps."""
    config = Config()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, recipe, prepare(folder, recipe, config))
    if (folder / "checkpoint.pt").exists():
        trainer.load(folder)
    recent: list[tuple[float, float, float]] = []
    begun = time.process_time()
    last = min(recipe.n_steps, stop_after or recipe.n_steps)
    while trainer.step < last:
        recent.append(trainer.train_step())
        if trainer.step % log_every == 0:
            loss, sure_loss, right = np.nanmean(recent, axis=0)
            print(
                f"step {trainer.step} loss {loss:.3f} predictable {sure_loss:.3f} right {right:.3f} "
                f"cpu_s {time.process_time() - begun:.0f}",
                flush=True,
            )
            recent.clear()
        if trainer.step % checkpoint_every == 0 or trainer.step == last:
            trainer.save(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, weights and checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.n_steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--stop-after", type=int, help="leave off at this step of the schedule")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    args = parser.parse_args()
    recipe = Recipe(n_steps=args.steps, seed=args.seed)
    train(args.out, recipe, stop_after=args.stop_after, checkpoint_every=args.checkpoint_every)


if __name__ == "__main__":
    main()
