"""H2O and StreamingLLM by their definitions, in numpy over whole masks, against the ops on pages, step by step.

The definition (heavy hitters: arXiv 2306.14048, with the semantics of `EvictionMask` in Graphcore's
llm-inference-research): every token of the sequence stays in memory and a mask says who is alive. When a token arrives,
each KV head keeps the budget: the newest tokens, the arriving one among them, and of the rest those with the highest
sum of attention weights over all queries so far, averaged over the query heads of the group. The dead stay dead. Then
the token attends to who is alive, and the weights are added up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.ops.cases import ALL, device_of, int32, load
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.retention import Retention

D, H, G, N = 16, 6, 2, 16
Array = np.ndarray


@dataclass
class Definition:
    """One request. ``alive`` bool [G, S], ``score`` [G, S]."""

    keys: Array  # [S, G, D]
    values: Array
    alive: Array = field(init=False)
    score: Array = field(init=False)

    def __post_init__(self) -> None:
        self.alive = np.zeros((G, len(self.keys)), bool)
        self.score = np.zeros((G, len(self.keys)))

    def weights(self, query: Array, visible: Array) -> Array:
        """[G, H/G, S] of one query [H, D]."""
        grouped = query.reshape(G, H // G, D)
        logits = np.einsum("ghd,sgd->ghs", grouped, self.keys) / np.sqrt(D)
        logits = np.where(visible[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        found: Array = weights / weights.sum(-1, keepdims=True)
        return found

    def prompt(self, queries: Array) -> None:
        """All of a prompt at once: every row sees what is before it."""
        for row, query in enumerate(queries):
            self.alive[:, row] = True
            self.score += self.weights(query, self.alive).mean(1)

    def step(self, position: int, query: Array, budget: int, recent: int, sinks: int, *, by_score: bool) -> Array:
        """Output [H, D] of the token at a position."""
        self.alive[:, position] = True
        age = np.arange(len(self.keys))
        for head in range(G):
            rank = self.score[head] if by_score else age.astype(float)
            rank = np.where((age > position - recent) | (age < sinks), np.inf, rank)
            living = [t for t in age if self.alive[head, t]]
            living.sort(key=lambda t: (-rank[t], t))
            self.alive[head, living[budget:]] = False
        weights = self.weights(query, self.alive)
        self.score += weights.mean(1)
        return np.einsum("ghs,sgd->ghd", weights, self.values).reshape(H, D)


LAYOUT = dict(head_size=D, block_size=N, dtype=torch.float32, positions=True)
RETENTIONS = {
    "h2o": Retention(budget=40, recent=12, sinks=0, rank="attention", bounded=False, interval=1, block_size=N),
    "h2o with sinks": Retention(
        budget=33, recent=1, sinks=3, rank="attention", bounded=False, interval=1, block_size=N
    ),
    "streaming": Retention(budget=37, recent=1, sinks=4, rank="age", bounded=False, interval=1, block_size=N),
}


@pytest.mark.parametrize("name", RETENTIONS)
@pytest.mark.parametrize("implementation", ALL)
def test_survivors_and_outputs_step_by_step(implementation: str, name: str) -> None:
    retention, by_score = RETENTIONS[name], name != "streaming"
    on = device_of(implementation)
    run = {op: load(op, implementation) for op in ("write", "prefill", "dense_decode", "evict")}
    n_prompt, n_steps = 70, 20 if implementation == "triton" else 60
    generator = torch.Generator().manual_seed(11)
    query, key, value = (
        torch.randn(n_prompt + n_steps, heads, D, generator=generator) * (1.5 if heads == H else 1)
        for heads in (H, G, G)
    )
    definition = Definition(key.double().numpy(), value.double().numpy())
    definition.prompt(query[:n_prompt].double().numpy())

    query, key, value = query.to(on), key.to(on), value.to(on)
    pages = Pages.empty(9, G, PageLayout(**LAYOUT, attention=by_score), on)
    pages.data.fill_(0xFF)
    table = int32([[5, 0, 7, 2, 8]][0]).to(on)[None]
    starts = int32([0, n_prompt]).to(on)
    run["write"](key[:n_prompt], value[:n_prompt], pages, table, starts, int32([n_prompt]).to(on), int32([0]).to(on))
    out = torch.empty(n_prompt, H, D, device=on)
    new = query[:n_prompt], key[:n_prompt], value[:n_prompt]
    run["prefill"](*new, pages, table, starts, int32([0]).to(on), scale=D**-0.5, out=out)
    for position in range(n_prompt, n_prompt + n_steps):
        arrival, budget = retention.arrival(position, n_prompt), retention.budget_of(n_prompt)
        recent = retention.recent_of(budget)
        want = definition.step(
            position, query[position].double().cpu().numpy(), budget, recent, retention.sinks, by_score=by_score
        )
        lens = (int32([n]).to(on) for n in (arrival.held, arrival.kept, position + 1 - recent))
        run["evict"](pages, table, *lens, sinks=retention.sinks, rank=retention.rank)
        now = slice(position, position + 1)
        length, one = int32([arrival.kept + 1]).to(on), int32([0, 1]).to(on)
        run["write"](key[now], value[now], pages, table, one, length, int32([position]).to(on))
        out = torch.empty(1, H, D, device=on)
        run["dense_decode"](query[now], pages, table, length, scale=D**-0.5, out=out)
        np.testing.assert_allclose(out[0].cpu().numpy(), want, rtol=1e-4, atol=1e-5)
        for head in range(G):
            slots = torch.arange(arrival.kept + 1, device=on)
            page = table[0].long()[slots // N]
            found = pages.positions[page, head, slots % N].tolist()
            assert sorted(found) == np.flatnonzero(definition.alive[head]).tolist(), f"KV head {head} at {position}"
            if by_score:
                scores = pages.attention[page, head, slots % N].cpu().numpy()
                np.testing.assert_allclose(scores, definition.score[head, found], rtol=1e-4, atol=1e-5)
