"""What the Triton kernels share: launch sizes, how much a sparse read takes of a context, and who is last.

A *row* is one request and one KV head; `split` programs share a row's tokens. All addresses are int64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparq.reads import Counts, Read

PROGRAMS_PER_SM = 4
"""Programs of a decode kernel per multiprocessor: enough to even out the tail, few enough to merge cheaply."""

SCRATCH_BYTES = 2 << 30
"""Largest scratch of one slice of a batch, where scratch grows with the tokens that a block table could hold."""

INTERPRETED_SMS = 1
"""Stands for the multiprocessors of a device where the Triton interpreter runs: some rows get split, cheaply."""


FIND_REQUESTS = tl.constexpr(128)
"""Requests that `find_request` looks at at a time."""

STEP_TENSORS = (
    *("block_table", "query_start_loc", "key_start_loc", "seq_lens", "context_lens", "first_positions"),
    *("kept_lens", "recent_from", "tokens", "n_listed", "arrivals"),
    *("n_blocks", "first_pages"),
)
STEP_SIZES = ("n_requests", "n_splits", "table_stride", "tokens_stride", "capacity", "sinks")

step_kernel: Any = triton.jit(do_not_specialize=STEP_SIZES, do_not_specialize_on_alignment=STEP_TENSORS)
"""`triton.jit` for kernels that are launched: whose code depends on nothing that a step alone decides.

Triton compiles a kernel again for pointers that are no multiple of 16 and for integers that are, or that are 1. A step
cuts its tables where its prompts begin, so those begin anywhere.
"""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels are interpreted on the CPU; decided, like the interpretation itself, when this module is imported."""


def aligned(n: int) -> int:
    """``n`` or the next multiple of 16: rows of scratch that long all begin where wide loads may."""
    return -(-n // 16) * 16


@functools.cache
def n_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device, asked once: a query per launch would cost microseconds."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_count(n_rows: int, max_tokens: int, device: torch.device, *, min_tokens: int, limit: int = 128) -> int:
    """Programs per row, a power of two (few variants to compile), from sizes the host knows without a sync."""
    wanted = -(-n_multiprocessors(device) * PROGRAMS_PER_SM // max(n_rows, 1))
    useful = -(-max_tokens // min_tokens)
    return triton.next_power_of_2(max(1, min(wanted, useful, limit)))


def slices(n_requests: int, n_bytes: int) -> Iterator[slice]:
    """The requests of a batch, as many at a time as have room in `SCRATCH_BYTES`; all take ``n_bytes``."""
    step = max(1, n_requests * SCRATCH_BYTES // max(n_bytes, SCRATCH_BYTES))
    for first in range(0, n_requests, step):
        yield slice(first, min(first + step, n_requests))


@functools.cache
def counts_of(read: Read) -> Counts | None:
    """The compile-time argument ``READ`` of a decode op; None stands for all tokens."""
    return read.counts


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 rounded to ``dtype``; the interpreter would cut off the bits that bf16 has no room for."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen(x):
    """fp32 of ``x``; the interpreter would lose the denormal numbers of bf16."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """``acc + a b`` in fp32; the interpreter would multiply the bit patterns of bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """``CAP * tanh(x / CAP)``, or x where CAP is 0."""
    if CAP == 0.0:
        return x
    else:
        y = x * (1.0 / CAP)
        e = tl.exp(-2.0 * tl.abs(y))
        large = (1.0 - e) / (1.0 + e)
        square = y * y
        small = tl.abs(y) * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        t = tl.where(tl.abs(y) > 0.125, large, small)
        return tl.where(y < 0.0, -CAP, CAP) * t


@triton.jit
def read_counts(context_len, READ: tl.constexpr):
    """(is_dense, tokens read, newest tokens among them) of a `SparseRead`, in its integer arithmetic."""
    s = context_len.to(tl.int64)
    k = tl.maximum(s * READ.slope // READ.per_tokens, READ.min_k)
    n_left = s - (k + 1) if READ.span == 1 else (tl.cdiv(s, READ.span) - k // READ.span) * READ.span
    is_dense = (s < READ.dense_below) | (n_left <= 0)
    n_read = tl.where(is_dense, s, s - n_left)
    local = k // 4 if READ.local is None else tl.minimum(k, READ.local)
    return is_dense, n_read.to(tl.int32), tl.minimum(s, local + 1).to(tl.int32)


@triton.jit
def split_tokens(n_tokens, split, N_SPLITS: tl.constexpr, TILE: tl.constexpr):
    """The tokens [start, stop) of one split: whole tiles, in order; none where the splits before took all."""
    per_split = tl.cdiv(tl.cdiv(n_tokens, N_SPLITS), TILE) * TILE
    start = split * per_split
    return start, tl.minimum(n_tokens, start + per_split)


@triton.jit
def is_last_to_arrive(arrivals, N_PROGRAMS: tl.constexpr):
    """Whether all others of the programs that share a counter have arrived; then what they stored may be loaded.

    The counter is zero before the launch: an earlier launch of the same call has seen to it. The barrier orders the
    stores of a program's threads before the one thread that counts, whose increment releases and acquires.
    """
    tl.debug_barrier()
    n_before = tl.zeros([], tl.int32)
    if N_PROGRAMS > 1:
        n_before = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    return n_before == N_PROGRAMS - 1


@triton.jit
def find_request(query_start_loc, n_requests, pid, TILE: tl.constexpr, SPARE: tl.constexpr):
    """(request, tile of it) that program ``pid`` serves; request -1 for none.

    Request b owns the programs from ``start_b // TILE + SPARE * b`` on: enough for its tiles, whatever the lengths, so
    that the grid follows from shapes alone.
    """
    request = pid * 0 - 1
    first_of_request = pid * 0
    for begin in range(0, n_requests, FIND_REQUESTS):
        index = begin + tl.arange(0, FIND_REQUESTS)
        starts = tl.load(query_start_loc + index, mask=index < n_requests, other=0)
        first = starts // TILE + SPARE * index
        mine = (index < n_requests) & (first <= pid)
        request += tl.sum(mine.to(tl.int32), 0)
        first_of_request = tl.maximum(first_of_request, tl.max(tl.where(mine, first, 0), 0))
    return request, pid - first_of_request
