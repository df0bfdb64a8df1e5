"""One layer with tokens in its pages, what is timed on it, and the records of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_sparq.benchmarks.gpu import timing
from vllm_sparq.benchmarks.gpu.cases import Case, load, shape_keys
from vllm_sparq.benchmarks.gpu.cells import Cell
from vllm_sparq.benchmarks.gpu.rivals import Attention, first_rival
from vllm_sparq.benchmarks.gpu.timing import Step
from vllm_sparq.layout import Pages
from vllm_sparq.reads import DenseRead

MEMORY_SHARE = 0.85
"""Of a device's memory that pages may take: scratch, graphs and PyTorch's own have the rest."""

PREFILL_SAMPLES = 10

DEVICE = "cuda"


class NoRoomError(Exception):
    """A cell that this device has no room for, whatever is free: another try would end alike.

    Attributes:
        needed_gib, total_gib: of its memory.
    """

    def __init__(self, needed_gib: float, total_gib: float) -> None:
        super().__init__(f"needs {needed_gib} GiB, and the card has {total_gib} GiB in total")
        self.needed_gib, self.total_gib = needed_gib, total_gib


@dataclass
class Layer:
    """A layer as a cell wants it: B requests of S tokens.

    Attributes:
        query: [B, H, D].
        new: K and V [B, G, D] of one more token each.
    """

    cell: Cell
    pages: Pages
    table: torch.Tensor
    lens: torch.Tensor
    query: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]

    @property
    def case(self) -> Case:
        return self.cell.case

    @property
    def scale(self) -> float:
        return float(self.case.head_size**-0.5)


def n_bytes(cell: Cell) -> int:
    """What the pages of a cell take, its rival's where those are not in the model's type, and what is restored."""
    case, context = cell.case, cell.context + cell.chunk
    of_rival = case.layout.record_bytes if case.format != "model" or case.tracked else 0
    restored = cell.context * case.layout.record_bytes if case.format != "model" and cell.kind == "prefill" else 0
    blocks = case.n_blocks(context) * case.block_size
    return cell.requests * case.kv_heads * (blocks * case.layout.bytes_per_token + context * of_rival + restored)


def filled(cell: Cell, device: str) -> Layer:
    """The layer, its tokens written a request at a time by our own op; the pages of a request lie apart."""
    case, b = cell.case, cell.requests
    g, d, dtype, context = case.kv_heads, case.head_size, case.layout.dtype, cell.context + cell.chunk
    blocks = case.n_blocks(context)
    width = max(blocks, case.n_blocks(cell.table_tokens))
    pages = Pages.empty(b * blocks, g, case.layout, device)
    table = torch.zeros(b, width, dtype=torch.int32, device=device)
    table[:, :blocks] = torch.randperm(b * blocks, device=device).int().view(b, blocks)
    lens = torch.full((b,), context, dtype=torch.int32, device=device)
    query = torch.randn(b, case.heads, d, device=device).to(dtype)
    starts = torch.tensor([0, context], dtype=torch.int32, device=device)
    key, value = (torch.empty(context, g, d, dtype=dtype, device=device) for _ in range(2))
    for row in range(b if device != "meta" else 1):
        key.normal_()
        value.normal_()
        shape_keys(case.keys, key, query[row : row + 1], [context])
        load("write", "triton")(key, value, pages, table[row : row + 1], starts, lens[row : row + 1])
    return Layer(cell, pages, table, lens, query, (key[-b:].clone(), value[-b:].clone()))


def decode_steps(layer: Layer) -> dict[str, Step]:
    """What we time of a decode: writing a token (into a page that goes on, and the last of one), and reading."""
    case, pages, table, lens, query = layer.case, layer.pages, layer.table, layer.lens, layer.query
    read = case.read  # resolved once, as an engine does: a step's time on the host is that of its launches
    write, dense, sparse = (load(op, "triton") for op in ("write", "dense_decode", read.op))
    starts, out = torch.arange(len(query) + 1, dtype=torch.int32, device=lens.device), torch.empty_like(query)
    fewer, options = lens - 1, dict(scale=layer.scale, out=out)
    return {
        "dense": lambda: dense(query, pages, table, lens, **options),
        read.op.removesuffix("_decode"): lambda: sparse(query, pages, table, lens, read=read, **options),
        "write": lambda: write(*layer.new, pages, table, starts, fewer),
        "write+close": lambda: write(*layer.new, pages, table, starts, lens),
    }


def prefill_steps(layer: Layer) -> dict[str, Step]:
    """A chunk of a prompt, whose tokens are in the pages already."""
    case, cell, device = layer.case, layer.cell, layer.lens.device
    n, dtype = cell.chunk, case.layout.dtype
    query = torch.randn(n, case.heads, case.head_size, device=device).to(dtype)
    key, value = (torch.randn(n, case.kv_heads, case.head_size, device=device).to(dtype) for _ in range(2))
    starts = torch.tensor([0, n], dtype=torch.int32, device=device)
    before, out, run = layer.lens - n, torch.empty_like(query), load("prefill", "triton")
    options = dict(scale=layer.scale, out=out)
    steps: dict[str, Step] = {
        "prefill": lambda: run(query, key, value, layer.pages, layer.table, starts, before, **options)
    }
    return steps if case.layout.quantized is None else {**steps, "restore": restoring(layer)}


def restoring(layer: Layer) -> Step:
    """Blocks before the chunk as a cache in the model's type: what FlashAttention over codes costs beside itself."""
    from vllm_sparq.ops.restore.triton import restore

    case, pages, b, device = layer.case, layer.pages, layer.cell.requests, layer.lens.device
    n = layer.cell.context // case.block_size
    shape = 2, b * n, case.block_size, case.kv_heads, case.head_size
    keys, values = torch.empty(shape, dtype=case.layout.dtype, device=device)
    n_blocks = torch.full((b,), n, dtype=torch.int32, device=device)
    first_pages = torch.arange(b, dtype=torch.int32, device=device) * n
    given = pages, layer.table, n_blocks, first_pages
    return lambda: restore(*given, most_blocks=n, keys=keys, values=values)


def launch(cell: Cell, device: str) -> None:
    """Every launch that a timed cell makes, for the compiler."""
    layer = filled(cell, device)
    for step in (prefill_steps if cell.kind == "prefill" else decode_steps)(layer).values():
        step()


def measure_decode(cell: Cell) -> Iterator[dict[str, Any]]:
    """A record a step, and one of the rival: time on the device, and the host's share of a call."""
    layer = filled(cell, DEVICE)
    case, steps = layer.case, decode_steps(layer)
    runs = {name: timing.capture(step) for name, step in steps.items()}
    rival, runs[rival], absent = with_rival(layer, layer.query, timing.capture)
    samples = timing.samples_us(runs)
    layout, context = case.layout, cell.context
    moved: dict[str, float] = {"write": 2 * layout.record_bytes, "write+close": case.block_size * layout.record_bytes}
    moved |= {each.op.removesuffix("_decode"): each.bytes_moved(layout, context) for each in (DenseRead(), case.read)}
    for name, times in samples.items():
        total = int(cell.requests * case.kv_heads * moved.get(name, context * layout.record_bytes))
        spread = timing.summary(times)
        found = {"method": name, **spread, "bytes_moved": total}
        found["gb_per_s"] = round(total / spread["median_us"] / 1e3, 1)
        if name in steps:
            found["host_us"] = timing.host_us(steps[name])
        yield {**found, **beside(rival, samples, times, absent)}


def measure_prefill(cell: Cell) -> Iterator[dict[str, Any]]:
    """The same of a chunk, with its arithmetic: multiplications and additions of q K and of P V."""
    layer = filled(cell, DEVICE)
    case, steps = layer.case, prefill_steps(layer)
    for step in steps.values():
        step()
    runs, n = dict(steps), cell.chunk
    query = torch.randn(n, case.heads, case.head_size, device=DEVICE).to(case.layout.dtype)
    rival, runs[rival], absent = with_rival(layer, query, ran)
    samples = timing.samples_us(runs, PREFILL_SAMPLES)
    operations = 4 * case.heads * case.head_size * (n * cell.context + n * (n + 1) // 2)
    n_tokens = cell.requests * case.kv_heads * cell.context
    restored = int(n_tokens * (case.layout.token_bytes + case.layout.record_bytes))
    for name, times in samples.items():
        spread = timing.summary(times)
        found: dict[str, Any] = {"method": name, **spread}
        if name == "restore":
            found |= {"bytes_moved": restored, "gb_per_s": round(restored / spread["median_us"] / 1e3, 1)}
        else:
            found["tflop_per_s"] = round(operations / spread["median_us"] / 1e6, 1)
        if name in steps:
            found["host_us"] = timing.host_us(steps[name])
        yield {**found, **beside(rival, samples, times, absent)}


def measure_kernels(cell: Cell) -> Iterator[dict[str, Any]]:
    """Each kernel of the sparse read, and of the dense one."""
    layer = filled(cell, DEVICE)
    for name, step in decode_steps(layer).items():
        yield {"method": name, "kernels_us": timing.kernels_us(step)}


def ran(step: Step) -> Step:
    """The step itself, after it has run once."""
    step()
    torch.cuda.synchronize()
    return step


def with_rival(layer: Layer, query: torch.Tensor, ready: Any) -> tuple[str, Step, dict[str, str]]:
    """The rival of a layer; over our pages where they hold K and V in the model's type."""
    cell, case, pages = layer.cell, layer.case, layer.pages
    wanted = Attention(query=query, n_kv_heads=case.kv_heads, requests=cell.requests, context=cell.context + cell.chunk)
    if case.format == "model":
        keys, values = pages.keys.transpose(1, 2), pages.values.transpose(1, 2)
        wanted = replace(wanted, table=layer.table, keys=keys, values=values)
    return first_rival(wanted, ready)


def beside(
    rival: str, samples: dict[str, list[float]], times: Sequence[float], absent: dict[str, str]
) -> dict[str, Any]:
    """What a record says of the rival of its cell."""
    ratio = sorted(samples[rival])[len(times) // 2] / sorted(times)[len(times) // 2]
    found: dict[str, Any] = {"rival": rival, "speedup_vs_rival": round(ratio, 3)}
    return found | ({"rivals_absent": absent} if absent else {})


def check_memory(cell: Cell) -> None:
    """Refuse a cell that this device has no room for.

    Raises:
        NoRoomError: it has less memory than the cell needs.
        MemoryError: it has enough, and less of it is free.
    """
    pages = n_bytes(cell) if cell.kind != "check" else cell.case.far_bytes
    needed = pages / MEMORY_SHARE
    free, total = map(int, torch.cuda.mem_get_info())
    if needed > total:
        raise NoRoomError(gib(needed), gib(total))
    if needed > free:
        raise MemoryError(f"needs {gib(needed)} GiB, and of {gib(total)} GiB {gib(free)} GiB are free")


def gib(n: float) -> float:
    """Of bytes."""
    return round(n / 2**30, 1)
