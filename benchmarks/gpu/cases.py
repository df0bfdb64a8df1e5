"""What the kernels are checked on: the shape of a layer, its requests, and pages with tokens in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vllm_sparq.config import Options
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dispatch import Choice
from vllm_sparq.reads import CUDA_BREAK_EVEN, READS, HeadShape, SpansRead, SparqRead


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch: requests of ``lens`` cached tokens, read as a CUDA engine reads where nothing else is said.

    Attributes:
        alpha_floor: as of `SparqRead`, over pages that hold sums of V; None for what the engine's defaults say.
        least_k: as of `SparqRead`; None for the engine's default.
        dense_below: contexts shorter than this are read densely; None for where a CUDA engine begins to read sparsely.
        tracked: whether pages hold positions and scores, so that tokens can be evicted.
        keys: at random; or the first outweighs all others; or all are the same.
        far_bytes: of pages of nobody before ours in the pool.
    """

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 128
    dtype: str = "bfloat16"
    ranking: str = "int4"
    format: str = "model"
    alpha_floor: float | None = None
    group_reduce: Literal["logits", "probs"] = "logits"
    local: int | None = None
    mass: float | None = None
    least_k: int | None = None
    dense_below: int | None = None
    tracked: bool = False
    keys: Literal["random", "sink", "equal"] = "random"
    far_bytes: int = 0
    lens: tuple[int, ...] = (1, 127, 128, 0, 129, 1500, 4000, 4096)

    @property
    def heads_shape(self) -> HeadShape:
        return HeadShape(head_size=self.head_size, n_heads=self.heads, n_kv_heads=self.kv_heads)

    @property
    def options(self) -> Options:
        """What an engine's options are, once nothing is left to the platform."""
        said: dict[str, Any] = dict(read="spans") if self.ranking == "bounds" else dict(ranking=self.ranking)
        said |= dict(format=self.format, local=self.local, group_reduce=self.group_reduce, mass=self.mass)
        return Options(dense_below=CUDA_BREAK_EVEN if self.dense_below is None else self.dense_below, **said)

    @property
    def layout(self) -> PageLayout:
        needs = READS[self.options.read].needs(self.options, grouped=self.heads_shape.grouped)
        sizes = dict(head_size=self.head_size, block_size=self.block_size, dtype=getattr(torch, self.dtype))
        sizes |= dict(positions=self.tracked, attention=self.tracked)
        value_sum = needs.value_sum or self.alpha_floor is not None
        return PageLayout(**sizes, ranking=needs.ranking, value_sum=value_sum, format=self.format)

    def n_blocks(self, context: int) -> int:
        """Blocks of a request, staging included."""
        return -(-context // self.block_size) + self.layout.n_staging_blocks

    @property
    def pages_before(self) -> int:
        """Pages of nobody, so that the addresses of ours begin ``far_bytes`` behind the pool's."""
        return -(-self.far_bytes // (self.kv_heads * self.layout.page_bytes))

    @property
    def sparse(self) -> str:
        """The op that reads few of the tokens of such pages."""
        return self.read.op

    @property
    def read(self) -> SparqRead | SpansRead:
        """What a decode step reads: the engine's, but for what this case says of it."""
        found: Any = self.options.read_of(self.heads_shape)
        said = {name: getattr(self, name) for name in ("alpha_floor", "least_k")} if self.ranking != "bounds" else {}
        read: SparqRead | SpansRead = replace(found, **{k: value for k, value in said.items() if value is not None})
        return read


SINK = 30.0
"""How many times the mean query of its group the K of an attention sink is."""


@dataclass
class World:
    """Tensors of one case. Rows of key and value are the tokens of the requests in order."""

    case: Case
    pages: Pages
    table: torch.Tensor
    seq_lens: torch.Tensor
    key: torch.Tensor  # all tokens [sum of lens, G, D]
    value: torch.Tensor
    query: torch.Tensor  # of the last token of each request [B, H, D]
    n_before: int = 0  # pages of nobody in front of those that are written

    @property
    def own(self) -> Pages:
        """The pages without those of nobody before them."""
        return Pages(self.pages.data[self.n_before :], self.case.layout)

    def write(self, implementation: str, first: list[int], stop: list[int]) -> None:
        """Write the tokens [first, stop) of each request."""
        rows, lens = self.rows(first, stop), self.int32(stop)
        starts = self.int32([0, *(b - a for a, b in zip(first, stop, strict=True))]).cumsum(0).int()
        load("write", implementation)(self.key[rows], self.value[rows], self.pages, self.table, starts, lens)

    def rows(self, first: list[int], stop: list[int]) -> torch.Tensor:
        begins = torch.tensor([0, *self.case.lens]).cumsum(0).tolist()
        return torch.cat([torch.arange(z + a, z + b) for z, a, b in zip(begins, first, stop, strict=False)])

    def int32(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.key.device)

    def outputs(self, implementation: str) -> dict[str, torch.Tensor]:
        """What the three readers make of the pages."""
        case, q = self.case, self.query
        options: dict[str, Any] = dict(scale=self.case.head_size**-0.5)
        n = self.case.block_size if self.case.layout.quantized else 1
        lens, context = list(case.lens), [s - min(s, 40) for s in case.lens]
        whole = [s // n * n for s in context]  # what prefill reads from pages
        rows, key_rows = self.rows(context, lens), self.rows(whole, lens)
        starts, key_starts = ([0, *(s - c for s, c in zip(lens, firsts, strict=True))] for firsts in (context, whole))
        new = q.repeat(len(rows) // len(q) + 1, 1, 1)[: len(rows)], self.key[key_rows], self.value[key_rows]
        out = {op: torch.full_like(q, torch.nan) for op in ("dense_decode", case.sparse)}
        out["prefill"] = torch.full_like(new[0], torch.nan)
        runs, shared = {op: load(op, implementation) for op in out}, (self.pages, self.table)
        runs["dense_decode"](q, *shared, self.seq_lens, **options, out=out["dense_decode"])
        runs[case.sparse](q, *shared, self.seq_lens, read=case.read, **options, out=out[case.sparse])
        starts_loc, key_starts_loc = (self.int32(numbers).cumsum(0).int() for numbers in (starts, key_starts))
        if n > 1:
            options["key_start_loc"] = key_starts_loc
        runs["prefill"](*new, *shared, starts_loc, self.int32(whole), **options, out=out["prefill"])
        return out


def build(case: Case, device: str, *, far: bool = False) -> World:
    """Random tokens; channels of K with their own scale and offset; NaN in every byte of the pages.

    With ``far`` the pages are the last of a pool in which ``case.far_bytes`` come before them.
    """
    gen = torch.Generator().manual_seed(len(repr(case)))
    g, d, blocks = case.kv_heads, case.head_size, [case.n_blocks(s) for s in case.lens]
    n_pages, n_before = sum(blocks) + 3, case.pages_before if far else 0
    pages = Pages.empty(n_before + n_pages, g, case.layout, device)
    pages.data[n_before:].fill_(0xFF)
    table = torch.full((len(case.lens), max(blocks) + 2), 2**31 - 1, dtype=torch.int32)
    for row, ids in zip(table, torch.randperm(n_pages, generator=gen).int().split([*blocks, 3]), strict=False):
        row[: len(ids)] = ids + n_before

    shapes = [(sum(case.lens), g, d)] * 2 + [(len(case.lens), case.heads, d)] + [(g, d)] * 3
    key, value, query, spread, key_offset, value_offset = (torch.randn(*shape, generator=gen) for shape in shapes)
    key = key * (spread.abs() + 0.5) + key_offset
    shape_keys(case.keys, key, query, case.lens)
    seq_lens = torch.tensor(case.lens, dtype=torch.int32)
    key, value, query = (t.to(case.layout.dtype).to(device) for t in (key, value + value_offset, query))
    return World(case, pages, table.to(device), seq_lens.to(device), key, value, query, n_before)


def shape_keys(kind: str, key: torch.Tensor, query: torch.Tensor, lens: Sequence[int]) -> None:
    """Make K, [sum of lens, G, D], of a kind: its first token outweighs all others, or all of its tokens are equal."""
    directions = query.unflatten(1, (key.shape[1], -1)).mean(2)  # [B, G, D]
    for direction, tokens in zip(directions, key.split(list(lens)), strict=True):
        if kind == "sink":
            tokens[:1] = SINK * direction
        elif kind == "equal":
            tokens[:] = tokens[:1].clone()


def load(op: str, implementation: str) -> Callable[..., None]:
    return Choice(op, implementation, "asked for").load()


def written(case: Case, device: str, implementation: str, *, far: bool = False) -> World:
    """The pages after a prompt and then one token of each request."""
    world, lens = build(case, device, far=far), list(case.lens)
    prompt = [max(s - 1, 0) for s in lens]
    world.write(implementation, [0] * len(lens), prompt)
    world.write(implementation, prompt, lens)
    return world
