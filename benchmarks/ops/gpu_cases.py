"""The cases of `gpu_check`, and whether the Triton kernels answer them as the reference does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from vllm_sparq.config import Options
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dispatch import Choice
from vllm_sparq.reads import HeadShape, SpansRead, SparqRead


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch: requests of ``lens`` cached tokens, the last ``new`` of each brought by the step."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 128
    dtype: str = "bfloat16"
    ranking: str = "int4"
    format: str = "model"
    alpha_floor: float = 0.5
    group_reduce: Literal["logits", "probs"] = "logits"
    local: int | None = None
    mass: float | None = None
    tracked: bool = False  # positions and scores, so that tokens can be evicted
    lens: tuple[int, ...] = (1, 127, 128, 0, 129, 1500, 4000, 4096)

    @property
    def layout(self) -> PageLayout:
        sizes = dict(head_size=self.head_size, block_size=self.block_size, dtype=getattr(torch, self.dtype))
        ranks_itself = self.format.startswith("kivi") and self.sparse == "sparq_decode"
        ranking = None if ranks_itself else self.ranking
        sizes |= dict(positions=self.tracked, attention=self.tracked)
        return PageLayout(**sizes, ranking=ranking, value_sum=True, format=self.format)

    def n_blocks(self, context: int) -> int:
        """Blocks of a request, staging included."""
        return -(-context // self.block_size) + self.layout.n_staging_blocks

    @property
    def sparse(self) -> str:
        """The op that reads few of the tokens of such pages."""
        return (SpansRead if self.ranking == "bounds" else SparqRead).op

    @property
    def read(self) -> SparqRead | SpansRead:
        options = Options(dense_below=1024, local=self.local, group_reduce=self.group_reduce, mass=self.mass)
        heads = HeadShape(head_size=self.head_size, n_heads=self.heads, n_kv_heads=self.kv_heads)
        if self.sparse == SpansRead.op:
            return SpansRead.resolve(options, heads)
        return replace(SparqRead.resolve(options, heads), alpha_floor=self.alpha_floor, least_k=16)


CASES = (
    Case(),
    Case(heads=8, kv_heads=8, alpha_floor=0.0),
    Case(heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", dtype="float16", block_size=64),
    Case(heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48),
    Case(heads=5, kv_heads=1, head_size=96, ranking="model", block_size=16, local=0),
    Case(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16"),
    Case(local=8, mass=0.5),
    Case(
        heads=16,
        kv_heads=2,
        head_size=64,
        group_reduce="probs",
        alpha_floor=1.0,
        mass=0.1,
        format="kivi4",
        tracked=True,
    ),
    *(Case(format=name) for name in ("int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")),
    Case(heads=6, kv_heads=2, head_size=80, alpha_floor=1.0, dtype="float32", block_size=48, format="int4"),
    Case(heads=5, kv_heads=1, head_size=96, block_size=64, local=0, dtype="float16", format="kivi2"),
    Case(heads=4, kv_heads=2, head_size=256, block_size=256, dtype="float16", format="kivi4"),
    Case(heads=16, kv_heads=2, head_size=64, ranking="int8", group_reduce="probs", block_size=64, format="int8"),
    *(Case(format=name, tracked=True) for name in ("model", "int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")),
    Case(heads=8, kv_heads=8, alpha_floor=0.0, dtype="float16", block_size=48, ranking="int8", tracked=True),
    Case(heads=16, kv_heads=2, head_size=64, group_reduce="probs", dtype="float16", block_size=64, tracked=True),
    *(Case(format=name, ranking="bounds") for name in ("model", "int8", "int4", "kivi4", "kivi2", "k8v4", "k4v2")),
    Case(heads=6, kv_heads=2, head_size=80, dtype="float32", block_size=48, ranking="bounds"),
    Case(heads=16, kv_heads=2, head_size=64, dtype="float16", block_size=16, ranking="bounds"),
    Case(heads=5, kv_heads=1, head_size=96, dtype="float16", block_size=64, format="kivi2", ranking="bounds"),
)

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Of an output, relative where it is above 1: the last rounding, and weights rounded before they multiply V."""

SCORES_TOLERANCE = {True: 2e-3, False: 0.1}
"""Of a score, relative where it is above 1: model's type, or codes, whose K is rounded before it makes logits."""

QUANTIZED_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Wider: what codes stand for is rounded to the model's type, K before it makes logits."""

SPARQ_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Wider: alpha comes from scores that are kept in the model's type, and a tie may go the other way."""


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
        """What the three readers make of the pages, on the CPU."""
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
        return {op: tensor.cpu() for op, tensor in out.items()}


def build(case: Case, device: str) -> World:
    """Random tokens; channels of K with their own scale and offset; NaN in every byte of the pages."""
    gen = torch.Generator().manual_seed(len(repr(case)))
    g, d, blocks = case.kv_heads, case.head_size, [case.n_blocks(s) for s in case.lens]
    pages = Pages.empty(sum(blocks) + 3, g, case.layout, device)
    pages.data.fill_(0xFF)
    table = torch.full((len(case.lens), max(blocks) + 2), 2**31 - 1, dtype=torch.int32)
    for row, ids in zip(table, torch.randperm(sum(blocks) + 3, generator=gen).int().split([*blocks, 3]), strict=False):
        row[: len(ids)] = ids

    shapes = [(sum(case.lens), g, d)] * 2 + [(len(case.lens), case.heads, d)] + [(g, d)] * 3
    key, value, query, spread, key_offset, value_offset = (torch.randn(*shape, generator=gen) for shape in shapes)
    random = key * (spread.abs() + 0.5) + key_offset, value + value_offset, query
    seq_lens = torch.tensor(case.lens, dtype=torch.int32)
    tensors = (t.to(case.layout.dtype).to(device) for t in random)
    return World(case, pages, table.to(device), seq_lens.to(device), *tensors)


def load(op: str, implementation: str) -> Callable[..., None]:
    return Choice(op, implementation, "asked for").load()


def written(case: Case, device: str, implementation: str) -> World:
    """The pages after a prompt and then one token of each request."""
    world, lens = build(case, device), list(case.lens)
    prompt = [max(s - 1, 0) for s in lens]
    world.write(implementation, [0] * len(lens), prompt)
    world.write(implementation, prompt, lens)
    return world


def wrong_bytes(got: World, want: World) -> float:
    """How many bytes differ, value sums aside; infinite if a value sum is off by more than rounding."""
    ours, theirs = Pages(got.pages.data.cpu(), got.case.layout), want.pages
    sums = theirs.value_sum
    error = (ours.value_sum - sums).abs() / (1 + sums.abs())
    if got.case.layout.quantized is not None:
        return float(sum(differ(ours, theirs, want.table[b], s, got.case) for b, s in enumerate(got.case.lens)))
    if not ours.value_sum.isnan().equal(sums.isnan()) or error.nan_to_num(0.0).max() > 1e-4:
        return math.inf
    for pages in (ours, theirs) if "scales" in ours.layout.parts else ():
        pages.scales[pages.scales == 0] = 0.0  # zeros may differ in sign
    for pages in (ours, theirs) if got.case.ranking == "bounds" else ():
        pages.ranking[pages.ranking == 0] = 0.0
    ours.value_sum.copy_(sums)
    return float((ours.data != theirs.data).sum())


def differ(ours: Pages, theirs: Pages, blocks: torch.Tensor, context: int, case: Case) -> float:
    """`wrong_bytes` of what the pages of one request define: codes of full blocks, sums, and staged tokens."""
    n, layout = case.block_size, case.layout
    full, begun = blocks[: context // n].long(), blocks[: -(-context // n)].long()
    names = ["key_codes", "key_scales", "value_codes", "value_scales"]
    names += [name for name in ("ranking", "scales") if name in layout.parts]
    pairs = [(getattr(ours, name)[full], getattr(theirs, name)[full]) for name in names]
    home, slot = slots_of(blocks, context, n)
    tracked = ("positions", "attention") if case.tracked else ()
    pairs += [(getattr(ours, name)[home, :, slot], getattr(theirs, name)[home, :, slot]) for name in tracked]
    for position in range(max(context - 1, 0) // n * n, context):
        ahead, place = layout.staged_at(position % n)
        page = int(blocks[position // n + 1 + ahead])
        pairs.append((ours.staged[page, :, place], theirs.staged[page, :, place]))
    error = (ours.value_sum[begun] - theirs.value_sum[begun]).abs() / (1 + theirs.value_sum[begun].abs())
    if not (error <= 1e-4).all():
        return math.inf
    return float(sum((a != b).sum() for a, b in pairs))


def run_checks(device: str, cases: tuple[Case, ...] = CASES) -> Iterator[dict[str, Any]]:
    """A record per case and op."""
    for case in cases:
        world, right = written(case, device, "triton"), written(case, "cpu", "reference")
        yield dict(check="write", case=asdict(case), error=wrong_bytes(world, right), limit=0)
        world.pages.data.copy_(right.pages.data)
        got, again, want = world.outputs("triton"), world.outputs("triton"), right.outputs("reference")
        for op in want:
            error = (got[op].float() - want[op].float()).abs() / want[op].float().abs().clamp(min=1)
            error = error.nan_to_num(math.inf).max()
            dense = TOLERANCE if case.format == "model" else QUANTIZED_TOLERANCE
            limit = (SPARQ_TOLERANCE if op == "sparq_decode" else dense)[case.dtype]
            yield dict(check=op, case=asdict(case), error=float(error), limit=limit)
            yield dict(check=f"{op} twice", case=asdict(case), error=float((got[op] != again[op]).sum()), limit=0)
        if case.tracked:
            yield from check_notes(case, device)


def check_notes(case: Case, device: str) -> Iterator[dict[str, Any]]:
    """The attention that the readers note, and an eviction by it: two records."""
    world, right = written(case, device, "triton"), written(case, "cpu", "reference")
    world.pages.data.copy_(right.pages.data)
    world.outputs("triton")
    right.outputs("reference")
    ours, theirs = Pages(world.pages.data.cpu(), case.layout), right.pages
    errors = []
    for b, s in enumerate(case.lens):
        page, place = slots_of(right.table[b], s, case.block_size)
        want = theirs.attention[page, :, place]
        errors.append((ours.attention[page, :, place] - want).abs() / want.clamp(min=1))
    error = torch.cat(errors).nan_to_num(math.inf).max()
    limit = SCORES_TOLERANCE[case.format == "model"]
    yield dict(check="attention", case=asdict(case), error=float(error), limit=limit)

    world.pages.data.copy_(theirs.data)
    kept = [s // 2 // case.block_size * case.block_size if s > 200 else s for s in case.lens]
    for one, implementation in ((world, "triton"), (right, "reference")):
        lens = one.int32(list(case.lens)), one.int32(kept), one.int32([s - 64 for s in case.lens])
        load("evict", implementation)(one.pages, one.table, *lens, sinks=4)
    ours = Pages(world.pages.data.cpu(), case.layout)
    wrong = sum(kept_differ(ours, theirs, right.table[b], n, case) for b, n in enumerate(kept))
    yield dict(check="evict", case=asdict(case), error=float(wrong), limit=0)


def slots_of(blocks: torch.Tensor, n_slots: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and place of a request's first slots."""
    slots = torch.arange(n_slots)
    return blocks.long()[slots // block_size], slots % block_size


def kept_differ(ours: Pages, theirs: Pages, blocks: torch.Tensor, n_kept: int, case: Case) -> float:
    """Elements that differ in what a request's kept slots define; infinite if a value sum is off."""
    layout, (page, place) = case.layout, slots_of(blocks, n_kept, case.block_size)
    names = ["positions", "attention"]
    names += ["keys", "values"] if layout.quantized is None else []
    pairs = [(getattr(ours, name)[page, :, place], getattr(theirs, name)[page, :, place]) for name in names]
    full = blocks[: n_kept // case.block_size].long()
    whole = [] if layout.quantized is None else ["key_codes", "key_scales", "value_codes", "value_scales"]
    whole += [name for name in ("ranking", "scales") if name in layout.parts]
    pairs += [(getattr(ours, name)[full], getattr(theirs, name)[full]) for name in whole]
    begun = blocks[: -(-n_kept // case.block_size)].long()
    error = (ours.value_sum[begun] - theirs.value_sum[begun]).abs() / (1 + theirs.value_sum[begun].abs())
    return float(sum((a != b).sum() for a, b in pairs)) if (error <= 1e-4).all() else math.inf
