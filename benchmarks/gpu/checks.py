"""Whether the Triton kernels answer a case as the reference does, and in a graph as outside of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparq.benchmarks.gpu.cases import Case, World, load, written
from vllm_sparq.layout import Pages

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Of an output, relative where it is above 1: the last rounding, and weights rounded before they multiply V."""

SCORES_TOLERANCE = {True: 2e-3, False: 0.1}
"""Of a score, relative where it is above 1: model's type, or codes, whose K is rounded before it makes logits."""

QUANTIZED_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Wider: what codes stand for is rounded to the model's type, K before it makes logits."""

SPARQ_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
"""Wider: alpha comes from scores that are kept in the model's type, and a tie may go the other way."""


@dataclass(frozen=True)
class Expected:
    """What the reference makes of a case, on the CPU: tensors alone, which a file can hold.

    Attributes:
        table: of its requests.
        written: the pages' bytes.
        answers: op -> what it answers.
        noted: the pages' bytes after that.
        kept: their bytes after an eviction, where tokens are tracked.
    """

    table: torch.Tensor
    written: torch.Tensor
    answers: dict[str, torch.Tensor]
    noted: torch.Tensor
    kept: torch.Tensor | None


def wrong_bytes(got: World, want: Expected) -> float:
    """How many bytes differ, value sums aside; infinite if a value sum is off by more than rounding."""
    ours, theirs = Pages(got.own.data.cpu(), got.case.layout), Pages(want.written.clone(), got.case.layout)
    if got.case.layout.quantized is not None:
        return float(sum(differ(ours, theirs, want.table[b], s, got.case) for b, s in enumerate(got.case.lens)))
    if not sums_agree(ours, theirs, slice(None)):
        return math.inf
    for pages in (ours, theirs) if "scales" in ours.layout.parts else ():
        pages.scales[pages.scales == 0] = 0.0  # zeros may differ in sign
    for pages in (ours, theirs) if got.case.ranking == "bounds" else ():
        pages.ranking[pages.ranking == 0] = 0.0
    if ours.layout.value_sum:
        ours.value_sum.copy_(theirs.value_sum)
    return float((ours.data != theirs.data).sum())


def sums_agree(ours: Pages, theirs: Pages, pages: slice | torch.Tensor) -> bool:
    """Whether the value sums of pages, where they hold any, differ by no more than rounding, and NaN stands for NaN."""
    if not ours.layout.value_sum:
        return True
    got, want = ours.value_sum[pages], theirs.value_sum[pages]
    close = (got - want).abs() / (1 + want.abs()) <= 1e-4
    return bool((close | (got.isnan() & want.isnan())).all())


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
    if not sums_agree(ours, theirs, begun):
        return math.inf
    return float(sum((a != b).sum() for a, b in pairs))


def expected(case: Case) -> Expected:
    """Seconds of one core: done beside the compiler, before a check begins."""
    world = written(case, "cpu", "reference")
    bytes_written = world.pages.data.clone()
    answers = world.outputs("reference")
    noted = world.pages.data.clone()
    kept = None
    if case.tracked:
        evicted(world, "reference")
        kept = world.pages.data.clone()
    return Expected(world.table, bytes_written, answers, noted, kept)


def launch_checks(case: Case, device: str) -> None:
    """Every launch of `run_checks`, for the compiler."""
    world = written(case, device, "triton")
    world.outputs("triton")
    if case.tracked:
        evicted(world, "triton")


def run_checks(case: Case, device: str, want: Expected | None = None) -> Iterator[dict[str, Any]]:
    """A record per op: its ``error``, of at most ``limit``."""
    want = want or expected(case)
    world = written(case, device, "triton", far=True)
    yield dict(check="write", error=wrong_bytes(world, want), limit=0)
    world.own.data.copy_(want.written)
    got = world.outputs("triton")
    if case.tracked:
        yield dict(check="attention", error=noted_error(world, want), limit=SCORES_TOLERANCE[case.format == "model"])
    again = world.outputs("triton")
    for op, answer in want.answers.items():
        error = (got[op].cpu().float() - answer.float()).abs() / answer.float().abs().clamp(min=1)
        dense = TOLERANCE if case.format == "model" else QUANTIZED_TOLERANCE
        limit = (SPARQ_TOLERANCE if op == "sparq_decode" else dense)[case.dtype]
        yield dict(check=op, error=float(error.nan_to_num(math.inf).max()), limit=limit)
        yield dict(check=f"{op} twice", error=float((got[op] != again[op]).sum()), limit=0)
    if want.kept is not None:
        world.own.data.copy_(want.noted)
        kept = evicted(world, "triton")
        ours, theirs = Pages(world.own.data.cpu(), case.layout), Pages(want.kept, case.layout)
        wrong = sum(kept_differ(ours, theirs, want.table[b], n, case) for b, n in enumerate(kept))
        yield dict(check="evict", error=float(wrong), limit=0)


def noted_error(world: World, want: Expected) -> float:
    """The largest error of the attention that the readers note."""
    case, errors = world.case, []
    ours, theirs = Pages(world.own.data.cpu(), case.layout), Pages(want.noted, case.layout)
    for b, s in enumerate(case.lens):
        page, place = slots_of(want.table[b], s, case.block_size)
        right = theirs.attention[page, :, place]
        errors.append((ours.attention[page, :, place] - right).abs() / right.clamp(min=1))
    return float(torch.cat(errors).nan_to_num(math.inf).max())


def evicted(world: World, implementation: str) -> list[int]:
    """Evict half of what long requests hold, in whole blocks; how many tokens each keeps."""
    case = world.case
    kept = [s // 2 // case.block_size * case.block_size if s > 200 else s for s in case.lens]
    lens = world.int32(list(case.lens)), world.int32(kept), world.int32([s - 64 for s in case.lens])
    load("evict", implementation)(world.pages, world.table, *lens, sinks=4, rank="attention")
    return kept


def check_graph(case: Case, device: str, capture: Callable[..., Callable[[], object]]) -> Iterator[dict[str, Any]]:
    """A captured step follows tensors that change after its capture: queries, lengths, block tables, and the pages.

    It is captured over requests that hold nothing, replayed over those of the case, and again after all pages have
    changed places. What it answers must be what the same step answers eagerly, to the bit.

    Args:
        capture: makes of a step what replays it.
    """
    world = written(case, device, "triton")
    n, starts = len(world.query), torch.arange(len(world.query) + 1, dtype=torch.int32, device=device)
    table, lens, pages = torch.zeros_like(world.table), torch.zeros_like(world.seq_lens), world.pages
    query, key, value = torch.zeros_like(world.query), *(torch.zeros_like(t[:n]) for t in (world.key, world.value))
    run, dense, write = (load(op, "triton") for op in (case.sparse, "dense_decode", "write"))
    out = {case.sparse: torch.zeros_like(query), "dense_decode": torch.zeros_like(query)}

    def step(n_new: torch.Tensor) -> None:
        write(key, value, pages, table, n_new, lens)
        run(query, pages, table, lens, read=case.read, scale=0.1, out=out[case.sparse])
        dense(query, pages, table, lens, scale=0.1, out=out["dense_decode"])

    n_new = torch.zeros_like(starts)  # nothing is brought until there is where to put it
    replay = capture(lambda: step(n_new))
    new = world.rows([s - 1 if s else 0 for s in case.lens], list(case.lens))
    n_new.copy_(world.int32([0, *(int(s > 0) for s in case.lens)]).cumsum(0).int())
    for tensor, source in ((key, world.key[new]), (value, world.value[new])):
        tensor[: len(source)] = source
    query.copy_(world.query)
    lens.copy_(world.seq_lens)
    places = torch.randperm(len(pages.data), generator=torch.Generator().manual_seed(1)).to(device)
    for moved in (False, True):
        table.copy_(world.table)
        if moved:
            pages.data.copy_(pages.data[places.argsort()])  # page p goes to places[p]
            known = world.table < len(places)
            table[known] = places[world.table[known].long()].int()
        for answer in out.values():
            answer.fill_(torch.nan)
        before = pages.data.clone()
        replay()
        got = {**{op: answer.clone() for op, answer in out.items()}, "write": pages.data.clone()}
        pages.data.copy_(before)
        step(n_new)
        want = {**out, "write": pages.data}
        for op in want:
            same = got[op].view(torch.uint8) == want[op].view(torch.uint8)
            where = "in a graph, pages moved" if moved else "in a graph"
            yield dict(check=f"{op} {where}", error=float((~same).sum()), limit=0)


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
    return float(sum((a != b).sum() for a, b in pairs)) if sums_agree(ours, theirs, begun) else math.inf
