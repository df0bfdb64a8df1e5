"""The one decoder of quantized pages on a GPU: where codes and scales lie, and tiles of K and V made from them.

Every reader takes its tiles from here, in the model's own type and in the orientation that its dot products want.

*Stored order*: a byte holds codes of several *runs* of a row (`Pages.key_codes`). A tile is unpacked run after run, so
its elements come as ``position = run * run_pad + index in the run``. For head sizes that are powers of two that is the
order of the channels; else padding sits after every run. Sums over channels do not care, as long as both factors keep
to it; neither do sums over tokens, where a row of codes is a channel (KIVI).
"""

# ruff: noqa: RUF005  Triton knows no starred element of a tuple

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import triton
import triton.language as tl

from vllm_sparq.layout import PageLayout
from vllm_sparq.ops.triton_common.launch import INTERPRETED, cast
from vllm_sparq.ops.triton_common.unpack import (
    as_bytes,
    dequantize,
    load_narrow,
    load_scales,
    row_units,
    signed_numbers,
    unpack,
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of packed codes with their scales, in a page. Offsets and steps are bytes.

    Attributes:
        codes, codes_step: where the codes of row 0 begin, and how far rows lie apart.
        scales, scales_step: the same for scales.
        bits: of a code.
        width: codes of a row.
        group: elements that share a scale; divides ``width``.
        numbers: for each group: 2 for scale and zero point, 1 for a scale alone, codes being signed.
        midpoints: see `vllm_sparq.formats.Coding`.
        number_bytes: of each.
    """

    codes: int
    codes_step: int
    scales: int
    scales_step: int
    bits: int
    width: int
    group: int
    numbers: int
    midpoints: bool
    number_bytes: int

    @property
    def runs(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    @property
    def run(self) -> int:
        """Codes of a run, and bytes of a row."""
        return self.width // self.runs

    @property
    def run_pad(self) -> int:
        return int(triton.next_power_of_2(self.run))

    @property
    def group_pad(self) -> int:
        return int(triton.next_power_of_2(self.group))

    @property
    def scale_bytes(self) -> int:
        return self.numbers * self.number_bytes

    @property
    def chunk(self) -> int:
        """Neighbouring bytes, a power of two that divides a run, whose codes share a scale in every run."""
        common = math.gcd(self.group, self.run)
        return common & -common

    @property
    def row_chunk(self) -> int:
        """The same where rows are read as a whole: with one group, all of the row."""
        return self.run_pad if self.group == self.width else self.chunk


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantized page, as the compile-time argument ``FORMAT``; None stands for pages of the model's own type.

    Attributes:
        keys: rows of K: a token each, or with ``channel_keys`` a channel each.
        values: rows of V, a token each.
        channel_keys: see `vllm_sparq.layout.Format`.
        staged: places for tokens in the model's own type, in a page.
    """

    keys: Rows
    values: Rows
    channel_keys: bool
    staged: int


def _rows(layout: PageLayout, part: str, width: int, codes: int, scales: int, step: int | None = None) -> Rows:
    """Rows of ``width`` codes; ``step`` where codes and scales of a token lie in one record."""
    coding, group, item = layout.coding(part), layout.group(part), layout.dtype.itemsize
    return Rows(
        codes=codes,
        codes_step=step or width * coding.bits // 8,
        scales=scales,
        scales_step=step or width // group * coding.scale_numbers * item,
        bits=coding.bits,
        width=width,
        group=group,
        numbers=coding.scale_numbers,
        midpoints=coding.midpoints,
        number_bytes=item,
    )


@functools.cache
def codes_of(layout: PageLayout) -> Codes | None:
    """The ``FORMAT`` of pages."""
    fmt = layout.quantized
    if fmt is None:
        return None
    if fmt.channel_keys:
        at = [layout.parts[name].offset for name in ("key_codes", "key_scales", "value_codes", "value_scales")]
        key = _rows(layout, "key", layout.block_size, at[0], at[1])
        value = _rows(layout, "value", layout.head_size, at[2], at[3])
    else:
        first = layout.parts["records"].offset
        value_codes, key_scales, value_scales, step = (first + offset for offset in layout.record_parts)
        key = _rows(layout, "key", layout.head_size, first, key_scales, step - first)
        value = _rows(layout, "value", layout.head_size, value_codes, value_scales, step - first)
    return Codes(keys=key, values=value, channel_keys=fmt.channel_keys, staged=layout.staged_per_page)


@triton.jit
def channel_order(FORMAT: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """(channels [D_PAD], which of them exist): the order of the channels in tiles of K, or of V."""
    position = tl.arange(0, D_PAD)
    if FORMAT is None or (KEYS and FORMAT.channel_keys) or (D == D_PAD):
        return position, position < D
    else:
        RUN: tl.constexpr = FORMAT.keys.run if KEYS else FORMAT.values.run
        RUN_PAD: tl.constexpr = FORMAT.keys.run_pad if KEYS else FORMAT.values.run_pad
        return position // RUN_PAD * RUN + position % RUN_PAD, position % RUN_PAD < RUN


@triton.jit
def decode_runs(
    codes_at,  # u8 [X, CHUNKS, CHUNK] addresses of codes
    scales_at,  # u8 [X, CHUNKS] addresses of the first scale of each row
    first,  # int32 [1, CHUNKS], index in the run of each chunk
    codes_mask,
    scales_mask,
    ROWS: tl.constexpr,
    dtype: tl.constexpr,
):
    """[X, runs * CHUNKS * CHUNK] elements in stored order, of type ``dtype``; 0 where masked. See `row_units`."""
    RUNS: tl.constexpr = ROWS.runs
    SIZE: tl.constexpr = codes_at.shape[1] * codes_at.shape[2] * RUNS
    packed = tl.load(codes_at, mask=codes_mask, other=0)
    runs = ()
    for r in tl.static_range(RUNS):
        group = (r * ROWS.run + first) // ROWS.group
        if ROWS.numbers == 1 and dtype != tl.float16:
            numbers = signed_numbers(packed, dtype)
        elif INTERPRETED or dtype == tl.float32:
            scale, zero = load_scales(scales_at + group * ROWS.scale_bytes, scales_mask, dtype, ROWS.numbers)
            numbers = cast(dequantize(packed, r, scale[:, :, None], zero[:, :, None], ROWS.bits), dtype)
        else:
            scale, zero = load_narrow(scales_at + group * ROWS.scale_bytes, scales_mask, ROWS.numbers)
            numbers = unpack(packed, r, scale[:, :, None], zero[:, :, None], ROWS, dtype)
        runs = runs + (numbers,)
    if RUNS == 1:
        return tl.reshape(runs[0], (codes_at.shape[0], SIZE))
    elif RUNS == 2:
        return tl.reshape(tl.permute(tl.join(runs[0], runs[1]), (0, 3, 1, 2)), (codes_at.shape[0], SIZE))
    else:
        four = tl.join(tl.join(runs[0], runs[2]), tl.join(runs[1], runs[3]))  # [.., j, k] is run 2 j + k
        return tl.reshape(tl.permute(four, (0, 3, 4, 1, 2)), (codes_at.shape[0], SIZE))


@triton.jit
def decode_rows(at, row, live, ROWS: tl.constexpr, dtype: tl.constexpr):
    """[X, runs * run_pad] rows, each of its own page; ``at`` [X] are the pages' first bytes."""
    CHUNK: tl.constexpr = ROWS.row_chunk
    chunk = tl.arange(0, ROWS.run_pad // CHUNK) * CHUNK
    inside = live[:, None] & (chunk < ROWS.run)[None, :]
    byte = chunk[:, None] + tl.arange(0, CHUNK)[None, :]
    codes_at = (at + row * ROWS.codes_step + ROWS.codes)[:, None, None] + byte[None, :, :]
    scales_at = (at + row * ROWS.scales_step + ROWS.scales)[:, None] + tl.zeros_like(chunk)[None, :]
    mask = live[:, None, None] & (byte < ROWS.run)[None, :, :]
    return decode_runs(codes_at, scales_at, chunk[None, :], mask, inside, ROWS, dtype)


@triton.jit
def decode_channels(
    data,
    table,
    first,
    stop,
    page_stride,  # in numbers of scales
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    dtype: tl.constexpr,
):
    """[D_PAD, TILE] channel-major K of the tokens of `tile_cells`."""
    BYTES: tl.constexpr = TILE // ROWS.runs
    CHUNK: tl.constexpr = min(ROWS.chunk, BYTES)
    column = tl.arange(0, BYTES // CHUNK) * CHUNK
    begin = first // ROWS.runs
    if ROWS.width % TILE == 0:  # one block
        live = tl.full(column.shape, 1, tl.int1)
        page = tl.load(table + begin // ROWS.run + tl.arange(0, 1)).to(tl.int64)
        index = tl.multiple_of(begin % ROWS.run, BYTES) + column
    else:
        live = begin + column < stop // ROWS.runs
        page = tl.load(table + (begin + column) // ROWS.run, mask=live, other=0).to(tl.int64)
        index = tl.multiple_of((begin + column) % ROWS.run, CHUNK)
    index = index[None, :]
    at = data + page * page_stride * ROWS.number_bytes
    d = tl.arange(0, D_PAD)
    inside = (d < D)[:, None] & live[None, :]
    codes_at = (at + ROWS.codes)[None, :] + (d * ROWS.codes_step)[:, None] + index
    codes_at = codes_at[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
    scales_at = (at + ROWS.scales)[None, :] + (d * ROWS.scales_step)[:, None]
    return decode_runs(codes_at, scales_at, index, inside[:, :, None], inside, ROWS, dtype)


@triton.jit
def gather(at, row, element, mask, ROWS: tl.constexpr, dtype: tl.constexpr):
    """fp32 of any elements, with a byte and a scale for each: pages ``at``, rows and elements that broadcast."""
    packed = tl.load(at + row * ROWS.codes_step + ROWS.codes + element % ROWS.run, mask=mask, other=0)
    scales_at = at + row * ROWS.scales_step + ROWS.scales + element // ROWS.group * ROWS.scale_bytes
    scale, zero = load_scales(scales_at, mask, dtype, ROWS.numbers)
    if ROWS.bits == 8:
        return dequantize(packed, 0, scale, zero, 8)
    else:
        packed = packed.to(tl.int32) >> (element // ROWS.run * ROWS.bits)
        return dequantize(packed, 0, scale, zero, ROWS.bits)


@triton.jit
def tile_slots(first, stop, N: tl.constexpr, FORMAT: tl.constexpr, TILE: tl.constexpr):
    """(block, slot, live) [TILE] of a tile of whole blocks' tokens: in order, or where K is channel-major by bytes.

    ``first`` is a multiple of TILE and ``stop`` of N; over all tiles every token comes once, either way. A tile that
    divides a block is in one: ``block`` is [1] then.
    """
    t = tl.arange(0, TILE)
    BYTES: tl.constexpr = TILE // FORMAT.keys.runs if FORMAT.channel_keys else TILE
    RUN: tl.constexpr = FORMAT.keys.run if FORMAT.channel_keys else N
    begin = first // (TILE // BYTES)
    if N % TILE == 0:
        block = begin // RUN + tl.arange(0, 1)
        return block, t // BYTES * RUN + t % BYTES + begin % RUN, tl.full([TILE], 1, tl.int1)
    else:
        column = begin + t % BYTES
        return column // RUN, t // BYTES * RUN + column % RUN, column < stop // (TILE // BYTES)


@triton.jit
def tile_cells(table, first, stop, N: tl.constexpr, FORMAT: tl.constexpr, TILE: tl.constexpr):
    """(page, slot, live) [TILE] of `tile_slots`; ``page`` may be [1]."""
    block, slot, live = tile_slots(first, stop, N, FORMAT, TILE)
    if N % TILE == 0:
        return tl.load(table + block).to(tl.int64), slot, live
    else:
        return tl.load(table + block, mask=live, other=0).to(tl.int64), slot, live


@triton.jit
def load_block_tile(
    records,  # pointer to this KV head, of the model's type
    table,
    first,
    stop,
    page_stride,  # in elements of the model's type
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """(K [D_PAD, TILE], V [TILE, D_PAD], units of both, live [TILE]) of one tile of quantized blocks.

    Tokens as in `tile_cells`; the units [TILE] are what K and V of each have to be multiplied with.
    """
    dtype: tl.constexpr = records.dtype.element_ty
    KEYS: tl.constexpr = FORMAT.keys  # an attribute as an argument would not be a constant to Triton 3.6
    VALUES: tl.constexpr = FORMAT.values
    page, slot, live = tile_cells(table, first, stop, N, FORMAT, TILE)
    at = as_bytes(records) + page * page_stride * FORMAT.keys.number_bytes
    if FORMAT.channel_keys:
        k = decode_channels(as_bytes(records), table, first, stop, page_stride, KEYS, D, D_PAD, TILE, dtype)
    else:
        k = tl.trans(decode_rows(at, slot, live, KEYS, dtype))
    v = decode_rows(at, slot, live, VALUES, dtype)
    return k, v, row_units(at, slot, live, KEYS, dtype), row_units(at, slot, live, VALUES, dtype), live


@triton.jit
def load_cells(
    records,
    page,
    slot,
    live,
    page_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """(K [D_PAD, TILE], V [TILE, D_PAD], units of both) of any tokens of quantized blocks."""
    dtype: tl.constexpr = records.dtype.element_ty
    KEYS: tl.constexpr = FORMAT.keys
    VALUES: tl.constexpr = FORMAT.values
    at = as_bytes(records) + page * page_stride * FORMAT.keys.number_bytes
    if FORMAT.channel_keys:
        d = tl.arange(0, D_PAD)[:, None]
        k = cast(gather(at[None, :], d, slot[None, :], live[None, :] & (d < D), KEYS, dtype), dtype)
    else:
        k = tl.trans(decode_rows(at, slot, live, KEYS, dtype))
    v = decode_rows(at, slot, live, VALUES, dtype)
    return k, v, row_units(at, slot, live, KEYS, dtype), row_units(at, slot, live, VALUES, dtype)


@triton.jit
def load_records(
    records,
    page,
    place,
    live,
    page_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    FORMAT: tl.constexpr,
    AS_ROWS: tl.constexpr = False,  # whether tokens are the rows of both products
):
    """(K [D_PAD, TILE], V [TILE, D_PAD]) of records in the model's type, in the channel orders of ``FORMAT``."""
    at = records + page * page_stride + place * (2 * D)
    d_key, in_key = channel_order(FORMAT, True, D, D_PAD)
    d_value, in_value = channel_order(FORMAT, False, D, D_PAD)
    if AS_ROWS:  # each in the order in which the product wants it: tensor cores then take it from where it arrives
        k = tl.load(at[:, None] + d_key[None, :], mask=live[:, None] & in_key[None, :], other=0.0)
        v = tl.load(at[None, :] + (D + d_value)[:, None], mask=live[None, :] & in_value[:, None], other=0.0)
        return tl.trans(k), tl.trans(v)
    else:
        k = tl.load(at[None, :] + d_key[:, None], mask=live[None, :] & in_key[:, None], other=0.0)
        v = tl.load(at[:, None] + (D + d_value)[None, :], mask=live[:, None] & in_value[None, :], other=0.0)
        return k, v


@triton.jit
def n_in_codes(context_len, N: tl.constexpr):
    """Tokens of a request that are read from codes: all but those of the newest block."""
    return tl.maximum(context_len - 1, 0) // N * N


@triton.jit
def staged_at(table, t, live, N: tl.constexpr, STAGED: tl.constexpr):
    """(page, place) of tokens ``t`` of a request's newest block, which wait in the blocks after it."""
    slot = t % N
    return tl.load(table + t // N + 1 + slot // STAGED, mask=live, other=0), slot % STAGED


@triton.jit
def cell_of(table, t, mask, context_len, N: tl.constexpr, STAGED: tl.constexpr):
    """Where the tokens ``t`` of a request are; STAGED places a page hold those of its newest block, unless 0.

    With STAGED None, the tokens themselves: what `mass` goes on with.
    """
    if STAGED is None:
        return t
    elif STAGED == 0:
        return tl.load(table + t // N, mask=mask, other=0) * N + t % N
    else:
        waits = mask & (t >= n_in_codes(context_len, N))
        page = tl.load(table + t // N, mask=mask & ~waits, other=0)
        ahead, place = staged_at(table, t, waits, N, STAGED)
        return tl.where(waits, ~(ahead * N + place), page * N + t % N)
