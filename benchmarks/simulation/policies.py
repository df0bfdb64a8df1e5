"""What a decoded token reads, by the definitions of the methods: one function per policy, in plain torch.

`POLICIES` is the table. A policy is made for a compression c and is then a function from a `Step` to the attention of
its new tokens; `share` is what it reads, as a fraction of dense's elements, counted in the model's type (sums of V are
fp32 and count twice). All tokens stay in memory and the prompt was attended to densely. Nothing here is fast, and no
code is shared with `vllm_sparq.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_sparq.benchmarks.simulation.kivi import rounded
from vllm_sparq.benchmarks.simulation.model import Step
from vllm_sparq.config import Options
from vllm_sparq.reads import HeadShape, SparqRead

RANKING_BLOCK = 128
"""Tokens that share a scale of the simulated ranking copy: a page of the engine."""

RANKING_BITS = {"int4": 4, "int8": 8, "model": 16}


@dataclass(frozen=True)
class Shape:
    """Of the model: query heads per KV head, and elements of a key."""

    group: int
    head_size: int


class Policy(Protocol):
    """Attends, and knows what it reads."""

    def __call__(self, step: Step) -> torch.Tensor:
        """Attention of the new tokens, [B, G, H/G, D]."""

    def share(self, context: int) -> float:
        """Elements read at a context of so many tokens, as a fraction of dense's."""


def attend(step: Step, visible: torch.Tensor) -> torch.Tensor:
    """Softmax attention to the ``visible`` tokens, bool [B, 1 or G, S]; [B, G, H/G, D]."""
    return weighted(step, step.scale * step.q @ step.k.transpose(-1, -2), visible)


def weighted(step: Step, logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """V of the ``visible`` tokens, weighted by the softmax of logits [B, G, H/G, S]."""
    return logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1) @ step.v


def best(rank: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """bool [B, ..., S]: the n [B] highest of each row of rank [B, ..., S]; of equal ones the first."""
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(rank.shape[-1]) < n.view(-1, *[1] * (rank.ndim - 1))
    return torch.zeros(rank.shape, dtype=torch.bool).scatter(-1, order, taken.expand_as(order))


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Everything."""

    def __call__(self, step: Step) -> torch.Tensor:
        return attend(step, step.exist)

    def share(self, context: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Sparq:
    """SparQ (arXiv 2312.04985): the k tokens with the best approximate scores, and something for the others.

    Attributes:
        read: r, k, local, alpha_floor and group_reduce. ``alpha_floor`` 1 gives the others nothing, 0 is the paper's
            mean of V over all tokens, weighted by their approximate probability; between, that weight is bounded.
        shape: of the model.
        ranking: type of the keys that rank: ``model`` for K itself, or codes with a scale for every
            `RANKING_BLOCK` tokens.
        block: give the others' probability to the means of V over blocks of so many tokens, each block as much as its
            own unread tokens have; None for the mean over all.
        unread: means over a block's unread tokens only (the block's sum less the rows that were read).
    """

    read: SparqRead
    shape: Shape
    ranking: str = "model"
    block: int | None = None
    unread: bool = False

    def __call__(self, step: Step) -> torch.Tensor:
        scores = self.approximate(step)
        chance = scores.softmax(-1)
        chosen = self.choose(step, scores, chance)
        y = attend(step, chosen)
        if self.read.alpha_floor >= 1:
            return y
        others = chance.masked_fill(chosen[:, :, None], 0)
        if self.block is not None:
            return chance.masked_fill(~chosen[:, :, None], 0).sum(-1, keepdim=True) * y + self.of_blocks(
                step, others, chosen
            )
        weight = others.sum(-1, keepdim=True).clamp(max=1 - self.read.alpha_floor)
        mean = (step.v * step.exist[..., None]).sum(2) / step.lengths[:, None, None]
        return (1 - weight) * y + weight * mean[:, :, None]

    def approximate(self, step: Step) -> torch.Tensor:
        """Scores [B, G, H/G, S] from r channels; -inf where there is no token."""
        q = step.q
        channels = q.abs().sum(2).sort(dim=-1, descending=True, stable=True).indices[..., : self.read.r]
        some = torch.zeros_like(q).scatter(-1, channels[:, :, None].expand(-1, -1, q.shape[2], -1), 1.0) * q
        coverage = some.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True)
        some = some * step.scale / torch.where(coverage > 0, coverage, 1.0).sqrt()
        scores = some @ step.k.transpose(-1, -2)
        if self.ranking != "model":
            copied = step.positions < step.n_prompt[:, None] // RANKING_BLOCK * RANKING_BLOCK
            scores = torch.where(copied[:, None, None], some @ self.copy(step).transpose(-1, -2), scores)
        return scores.masked_fill(~step.exist[:, :, None], -torch.inf)

    def copy(self, step: Step) -> torch.Tensor:
        """K in codes of each block and channel; made once, so that only the prompt's blocks mean anything."""
        if "copy" not in step.memory:
            n = step.k.shape[2] // RANKING_BLOCK * RANKING_BLOCK
            blocks = step.k[:, :, :n].transpose(2, 3).unflatten(-1, (-1, RANKING_BLOCK))
            codes = rounded(blocks, RANKING_BITS[self.ranking]).flatten(-2).transpose(2, 3)
            step.memory["copy"] = torch.cat([codes, step.k[:, :, n:]], 2)
        copy: torch.Tensor = step.memory["copy"]
        return copy

    def choose(self, step: Step, scores: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """bool [B, G, S]: the tokens of each query group."""
        rank = (scores if self.read.group_reduce == "logits" else chance).sum(2)
        lengths = step.lengths.tolist()
        n_local = torch.tensor([self.read.n_local(length) for length in lengths])
        newest = step.exist & (step.positions >= (step.lengths - n_local)[:, None, None])
        rank = rank.masked_fill(newest, torch.inf).masked_fill(~step.exist, -torch.inf)
        return best(rank, torch.tensor([self.read.n_selected(length) for length in lengths]))

    def of_blocks(self, step: Step, others: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The others' probabilities [B, G, H/G, S] times the means of their blocks, [B, G, H/G, D]."""
        assert self.block is not None
        counted = step.exist & ~chosen if self.unread else step.exist.expand_as(chosen)
        sums = by_span((step.v * counted[..., None]).transpose(2, 3), self.block, 0.0).sum(-1).transpose(2, 3)
        counts = by_span(counted.float(), self.block, 0.0).sum(-1).clamp(min=1)
        mass = by_span(others, self.block, 0.0).sum(-1)
        return mass @ (sums / counts[..., None])

    def share(self, context: int) -> float:
        n_read = self.read.n_selected(context)
        if n_read == context:
            return 1.0
        head_size = self.shape.head_size
        elements = self.read.r * context * RANKING_BITS[self.ranking] / 16 + 2 * n_read * head_size
        if self.read.alpha_floor < 1:
            elements += 2 * head_size * (1 if self.block is None else math.ceil(context / self.block))
        return elements / (2 * context * head_size)


def by_span(x: torch.Tensor, span: int, fill: float) -> torch.Tensor:
    """x [..., S] as [..., S / span, span], filled up."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % span), value=fill)
    return padded.reshape(*x.shape[:-1], -1, span)


@dataclass(frozen=True, kw_only=True)
class Quest:
    """Quest (arXiv 2406.10774): the spans whose keys could score highest, and the newest one.

    A span's bound is the sum over channels of the larger of q * least and q * largest key, summed over the query group
    here, so that a group reads alike. Its keys' bounds are read for all spans: 1/span of dense's elements.
    """

    compression: float
    span: int = 16

    def n_spans(self, context: int) -> int:
        """Spans read, the newest included."""
        wanted = int(context * (1 / self.compression - 1 / self.span) / self.span)
        return min(math.ceil(context / self.span), max(1, wanted))

    def __call__(self, step: Step) -> torch.Tensor:
        keys = step.k.transpose(2, 3)  # [B, G, D, S]
        missing = ~step.exist[:, :, None]
        low = by_span(keys.masked_fill(missing, torch.inf), self.span, torch.inf).amin(-1)  # [B, G, D, spans]
        high = by_span(keys.masked_fill(missing, -torch.inf), self.span, -torch.inf).amax(-1)
        q = step.q[..., None]  # [B, G, H/G, D, 1]
        bound = torch.maximum(q * low[:, :, None], q * high[:, :, None]).sum(3).sum(2)  # [B, G, spans]
        spans, last = torch.arange(bound.shape[-1]), ((step.lengths - 1) // self.span)[:, None, None]
        rank = bound.masked_fill(spans == last, torch.inf).masked_fill(spans > last, -torch.inf)
        chosen = best(rank, torch.tensor([self.n_spans(length) for length in step.lengths.tolist()]))
        return attend(step, chosen.repeat_interleave(self.span, -1)[..., : step.k.shape[2]] & step.exist)

    def share(self, context: int) -> float:
        return min(1.0, self.n_spans(context) * self.span / context) + 1 / self.span


@dataclass(frozen=True, kw_only=True)
class InfLLM:
    """InfLLM (arXiv 2402.04617): first tokens, a window of the newest, and blocks looked up between them.

    Blocks follow the first tokens. For each query head a block is represented by the mean of the ``n_keys`` keys with
    the most local attention (`local_attention`); a layer takes, for all its heads, the blocks with the largest sum over
    the query heads of q times representative. The budget is split as the benchmark paper splits it (arXiv 2407.01527):
    2.1% first tokens, 32.4% blocks (whole ones, at least one), the rest window. As published, looking up is not charged
    to the budget; `share` counts it. Unlike the authors' code, keys stay at their own positions, and answers are in no
    block, only in the window.
    """

    compression: float
    shape: Shape
    block: int = 32
    n_keys: int = 4

    def split(self, context: int) -> tuple[int, int, int]:
        """First tokens, blocks, newest tokens."""
        budget = max(self.block + 2, int(context / self.compression))
        n_first = max(1, round(0.021 * budget))
        n_blocks = max(1, round(0.324 * budget / self.block))
        return n_first, n_blocks, budget - n_first - n_blocks * self.block

    def __call__(self, step: Step) -> torch.Tensor:
        splits = [self.split(length) for length in step.n_prompt.tolist()]
        n_first, n_blocks, n_local = (torch.tensor(column)[:, None] for column in zip(*splits, strict=True))
        if "keys" not in step.memory:
            step.memory["keys"] = self.representatives(step, n_first[:, 0])
        start = step.lengths[:, None] - n_local
        found = torch.einsum("bghd,bghnd->bn", step.q, step.memory["keys"])
        ends = n_first + (torch.arange(found.shape[1]) + 1) * self.block
        known = ends <= torch.minimum(start, step.n_prompt[:, None])  # whole, after the window, and of the prompt
        chosen = best(found.masked_fill(~known, -torch.inf), n_blocks[:, 0]) & known
        block_of = (step.positions - n_first).div(self.block, rounding_mode="floor")  # [B, S]
        inside = (block_of >= 0) & (block_of < found.shape[1])
        looked_up = chosen.gather(1, block_of.clamp(0, found.shape[1] - 1)) & inside
        visible = (step.positions < n_first) | (step.positions >= start) | looked_up
        return attend(step, visible[:, None] & step.exist)

    def representatives(self, step: Step, n_first: torch.Tensor) -> torch.Tensor:
        """[B, G, H/G, blocks, D]."""
        if step.heat is None:
            raise ValueError("InfLLM needs contexts that were read with_heat")
        n_blocks = (step.k.shape[2] - int(n_first.min())) // self.block
        inside = torch.arange(n_blocks * self.block)
        at = (n_first[:, None] + inside).clamp(max=step.k.shape[2] - 1)[:, None]  # [B, 1, blocks * block]
        keys = step.k.gather(2, at[..., None].expand(-1, step.k.shape[1], -1, step.k.shape[3]))
        heat = step.heat.gather(3, at[:, None].expand(*step.heat.shape[:3], -1)).unflatten(-1, (n_blocks, -1))
        top = best(heat.flatten(1, 3), torch.full((len(n_first),), self.n_keys)).view_as(heat).float()
        return torch.einsum("bghnt,bgntd->bghnd", top, keys.unflatten(2, (n_blocks, -1))) / self.n_keys

    def share(self, context: int) -> float:
        n_first, n_blocks, n_local = self.split(context)
        n_read = min(context, n_first + n_blocks * self.block + n_local)
        return n_read / context + self.shape.group / (2 * self.block)


@dataclass(frozen=True, kw_only=True)
class Window:
    """First and newest tokens, S / c of them (arXiv 2309.17453), and how far away the first ones seem.

    Attributes:
        positions: ``own``: where they are; ``cache``: positions are counted in the cache, as StreamingLLM does, so that
            the first tokens come right before the newest; ``capped``: the first tokens' keys are not rotated, and the
            query stands at most as many tokens from the start as the window has (LM-Infinite, arXiv 2308.16137).
        n_first: of them.
    """

    compression: float
    positions: str = "own"
    n_first: int = 4

    def __call__(self, step: Step) -> torch.Tensor:
        n_kept = torch.tensor([self.n_kept(length) for length in step.n_prompt.tolist()])
        first = step.positions < self.n_first
        newest = step.positions >= (step.lengths - n_kept + self.n_first)[:, None]
        logits = step.scale * step.q @ step.k.transpose(-1, -2)
        if self.positions != "own":
            last = step.lengths - 1
            capped = self.positions == "capped"
            stands = torch.minimum(last, n_kept - self.n_first if capped else n_kept - 1)
            q = rotated(step.q, (stands - last)[:, None, None], step.theta)
            keys = step.k[:, :, : self.n_first]
            if capped:
                keys = rotated(keys, -step.positions[: self.n_first], step.theta)
            moved = step.scale * q @ keys.transpose(-1, -2)
            within = newest[:, None, None, : self.n_first]  # of the window too, and seen there as any other token
            logits[..., : self.n_first] = torch.where(within, logits[..., : self.n_first], moved)
        return weighted(step, logits, (first | newest)[:, None] & step.exist)

    def n_kept(self, context: int) -> int:
        return max(self.n_first + 1, int(context / self.compression))

    def share(self, context: int) -> float:
        return min(1.0, self.n_kept(context) / context)


def rotated(x: torch.Tensor, by: torch.Tensor, theta: float) -> torch.Tensor:
    """x [..., D], rotated on by so many positions [...] as Llama rotates: channel i with channel i + D / 2."""
    half = x.shape[-1] // 2
    angle = by[..., None] * theta ** (-torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@dataclass(frozen=True)
class Wanted:
    """What a policy is made for: the model's shape, the compression, and options of SparQ over its own."""

    shape: Shape
    compression: float
    options: Options

    def sparq(self, alpha_floor: float, block: int | None = None, unread: bool = False) -> Sparq:
        head_size, group = self.shape.head_size, self.shape.group
        read = SparqRead.resolve(self.options, HeadShape(head_size=head_size, n_heads=group, n_kv_heads=1))
        fields = {name: getattr(read, name) for name in ("r", "min_k", "k_per_token", "local", "group_reduce")}
        read = SparqRead(**fields, alpha_floor=alpha_floor)
        return Sparq(read=read, shape=self.shape, ranking=self.options.ranking, block=block, unread=unread)


POLICIES: dict[str, Callable[[Wanted], Policy]] = {
    "sparq": lambda at: at.sparq(1.0),
    "sparq-mean": lambda at: at.sparq(0.0),
    "sparq-mean-0.5": lambda at: at.sparq(0.5),
    "sparq-mean-0.75": lambda at: at.sparq(0.75),
    "sparq-mean-0.9": lambda at: at.sparq(0.9),
    "sparq-blocks-128": lambda at: at.sparq(0.0, 128),
    "sparq-blocks-16": lambda at: at.sparq(0.0, 16),
    "sparq-unread-16": lambda at: at.sparq(0.0, 16, unread=True),
    "quest": lambda at: Quest(compression=at.compression),
    "infllm": lambda at: InfLLM(compression=at.compression, shape=at.shape),
    "streaming": lambda at: Window(compression=at.compression),
    "streaming-cache": lambda at: Window(compression=at.compression, positions="cache"),
    "lm_infinite": lambda at: Window(compression=at.compression, positions="capped"),
}
"""Name -> the policy for a compression."""
