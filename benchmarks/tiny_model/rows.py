"""Training rows: endless, drawn from a seed, made of the templates of the tasks.

- facts: facts in filler text, then up to sixteen of them asked for.
- copy: a passage, then pieces of it again.
- map: lines "key -> value", then some of them again.
- lm: plain text.

The loss weighs 1 on what the row itself predicts and 0.3 on text; what cannot be predicted has no loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from vllm_sparq.benchmarks.tasks import generated as tasks
from vllm_sparq.benchmarks.tiny_model.tokenizer import SPECIAL

BOS_ID = SPECIAL.index("<bos>")
TEXT_WEIGHT = 0.3
N_BLIND = 4  # first tokens of a repeated piece, from which its place has to be recognised
MAX_FACTS = tasks.N_RECALL_FACTS


@dataclass(frozen=True)
class Batch:
    """Rows of T tokens. `weights[:, t]` weighs the prediction of token t from those before it."""

    ids: Tensor  # [B, T] int64
    positions: Tensor  # [B, T] int64
    weights: Tensor  # [B, T] float32


class Row:
    """Token ids and loss weights, put together piece by piece."""

    def __init__(self) -> None:
        self.ids: list[int] = [BOS_ID]
        self.weights: list[float] = [0.0]

    def add(self, ids: Sequence[int], weights: float | Sequence[float]) -> None:
        self.ids += ids
        self.weights += [weights] * len(ids) if isinstance(weights, float) else weights


class RowMaker:
    """Draws rows. `corpus`: token ids of the training text, end to end."""

    def __init__(self, tokenizer: Tokenizer, corpus: np.ndarray, *, n_generated_sentences: int = 20_000) -> None:
        self.tokenizer = tokenizer
        self.corpus = corpus
        rng = random.Random("filler of the training rows")
        haystack = " ".join(tasks.sentence(rng) for _ in range(n_generated_sentences))
        self.haystack = np.array(self.encode([haystack])[0], dtype=np.uint16)
        self.kinds = {"facts": self.facts, "copy": self.copy, "map": self.map, "lm": self.lm}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def filler(self, rng: random.Random, n_tokens: int) -> list[int]:
        """Tokens of text: from the corpus or from the tasks' haystack, evenly."""
        source = rng.choice((self.corpus, self.haystack))
        start = rng.randrange(len(source) - n_tokens)
        return [int(i) for i in source[start : start + n_tokens]]

    def facts(self, rng: random.Random, n_tokens: int) -> Row:
        most = min(MAX_FACTS, max(1, n_tokens // 28))
        n_facts = rng.randint(1, most) if rng.random() < 0.5 else most
        names = tasks.new_words(rng, n_facts, held_out=False)
        values = [tasks.new_number(rng, held_out=False) for _ in names]
        facts = self.encode([" " + tasks.fact(n, v) for n, v in zip(names, values, strict=True)])
        asked = rng.sample(range(n_facts), n_facts)
        prompts = self.encode(["\n" + tasks.question(names[i]) for i in asked])
        answers = self.encode([f" {values[i]}." for i in asked])
        # At least one question, then as many as leave an eighth of the row to filler.
        room = n_tokens - 1 - sum(map(len, facts)) - n_tokens // 8
        n_asked, used = 0, 0
        for prompt, answer in zip(prompts, answers, strict=True):
            if n_asked and used + len(prompt) + len(answer) > room:
                break
            n_asked, used = n_asked + 1, used + len(prompt) + len(answer)
        n_filler = max(0, n_tokens - 1 - sum(map(len, facts)) - used)
        filler = self.filler(rng, n_filler)
        row, done = Row(), 0
        for fact, place in zip(facts, sorted(rng.randint(0, n_filler) for _ in facts), strict=True):
            row.add(filler[done:place], TEXT_WEIGHT)
            row.add(fact, 0.0)
            done = place
        row.add(filler[done:], TEXT_WEIGHT)
        for prompt, answer in zip(prompts[:n_asked], answers[:n_asked], strict=True):
            row.add(prompt, TEXT_WEIGHT)
            row.add(answer, 1.0)
        return row

    def passage(self, rng: random.Random, n_tokens: int) -> tuple[list[str], float]:
        """Words worth about `n_tokens` tokens, and the weight of their first appearance."""
        kind = rng.random()
        if kind < 0.25:
            return self.tokenizer.decode(self.filler(rng, n_tokens)).split(" ")[1:], TEXT_WEIGHT
        words: list[str] = []
        numbers = 0.3 if kind < 0.4 else 0.0
        while len(words) < n_tokens // 3:
            words += tasks.passage_sentence(rng, held_out=False)
            if rng.random() < numbers:
                words.append(tasks.new_number(rng, held_out=False))
        return words, 0.0

    def copy(self, rng: random.Random, n_tokens: int) -> Row:
        words, weight = self.passage(rng, int(n_tokens * rng.uniform(0.3, 0.75)))
        row = Row()
        row.add(self.encode([" ".join(words)])[0], weight)
        while len(row.ids) < n_tokens:
            n_words = rng.randint(6, 60)
            start = rng.randint(0, max(0, len(words) - n_words))
            piece = self.encode(["\n" + " ".join(words[start : start + n_words])])[0]
            blind = min(N_BLIND + 1, len(piece))
            row.add(piece, [0.0] * blind + [1.0] * (len(piece) - blind))
        return row

    def map(self, rng: random.Random, n_tokens: int) -> Row:
        numbers = rng.random() < 0.25
        n_shown = max(2, int(n_tokens * rng.uniform(0.3, 0.75)) // 9)
        keys = tasks.new_words(rng, n_shown, held_out=False)
        new_value = tasks.new_number if numbers else tasks.new_word
        values = [new_value(rng, held_out=False) for _ in keys]
        row = Row()
        row.add(self.encode(["\n".join(map(tasks.map_line, keys, values))])[0], 0.0)
        while len(row.ids) < n_tokens:
            asked = rng.sample(range(n_shown), min(n_shown, 32))
            prompts = self.encode(["\n" + tasks.map_question(keys[i]) for i in asked])
            answers = self.encode([" " + values[i] for i in asked])
            for prompt, answer in zip(prompts, answers, strict=True):
                row.add(prompt, [1.0, 0.0] + [TEXT_WEIGHT] * (len(prompt) - 2))
                row.add(answer, 1.0)
        return row

    def lm(self, rng: random.Random, n_tokens: int) -> Row:
        row = Row()
        row.add(self.filler(rng, n_tokens - 1), TEXT_WEIGHT)
        return row

    def batch(
        self, rng: random.Random, *, n_rows: int, n_tokens: int, mixture: dict[str, float], max_positions: int
    ) -> Batch:
        """`n_rows` rows of `n_tokens` tokens, of kinds drawn from `mixture`; every other one with position jumps."""
        kinds = rng.choices(list(mixture), weights=list(mixture.values()), k=n_rows)
        rows = [self.kinds[kind](rng, n_tokens) for kind in kinds]
        positions = [
            jumping_positions(rng, n_tokens, max_positions) if rng.random() < 0.5 else list(range(n_tokens))
            for _ in rows
        ]
        return Batch(
            torch.tensor([row.ids[:n_tokens] for row in rows]),
            torch.tensor(positions),
            torch.tensor([row.weights[:n_tokens] for row in rows]),
        )


def jumping_positions(rng: random.Random, n_tokens: int, max_positions: int) -> list[int]:
    """Positions 0, 1, 2, ... with one to three jumps ahead, below `max_positions` (PoSE, arXiv 2309.10400).

    Short rows so see the distances of long ones.
    """
    places = sorted(rng.randrange(1, n_tokens) for _ in range(rng.randint(1, 3)))
    total = rng.randint(0, max_positions - n_tokens)
    jumps = sorted(rng.randint(0, total) for _ in places)  # how far ahead one is after each
    positions: list[int] = []
    ahead, done = 0, 0
    for place, jump in zip([*places, n_tokens], [*jumps, 0], strict=True):
        positions += range(done + ahead, place + ahead)
        done, ahead = place, jump
    return positions
