"""Every variant of the Triton kernels that steps may launch, launched once at start, so that no request waits for one.

A kernel is compiled for each set of its compile-time arguments. Most of these are the model's and the options'; what a
step decides is in how many programs a row is split, and how large the tiles of a prompt are. Here are a few calls of
each op that bring all of them. Their requests have no tokens: the kernels return at once and write to no page.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from vllm_sparq.layout import Pages
from vllm_sparq.ops.restore.triton import restore
from vllm_sparq.ops.triton_common.launch import INTERPRETED, PROGRAMS_PER_SM, n_multiprocessors
from vllm_sparq.ops.triton_common.merge import merge

IS_COMPILED = not INTERPRETED.value
"""Whether there is anything to compile."""

MOST_SPLITS = 128
"""Of `split_count`, in what `merge` gets."""


def programs_wanted(pages: Pages) -> int:
    """Rows of so many programs are not split."""
    return n_multiprocessors(pages.data.device) * PROGRAMS_PER_SM


def warm_decodes(decode: Callable[..., None], pages: Pages, n_heads: int, width: int) -> None:
    """``decode`` is an op with its read; ``width`` the blocks of its block tables.

    Rows of a batch are split into a power of two, which halves where the batch doubles.
    """
    n_requests, n_rows = 1, pages.data.shape[1]
    while True:
        query = _heads(n_requests, n_heads, pages)
        decode(query, pages, *_nothing(n_requests, width, pages), scale=1.0, out=torch.empty_like(query))
        if n_requests * n_rows >= programs_wanted(pages):
            return
        n_requests *= 2


def warm_writes(write: Callable[..., None], pages: Pages, width: int) -> None:
    """With positions that are those of the slots, and others."""
    key = _heads(1, pages.data.shape[1], pages)
    table, lens = _nothing(1, width, pages)
    for first_positions in (None, lens) if pages.layout.positions else (None,):
        write(key, key, pages, table, _starts(1, pages), lens, first_positions)


def warm_prefills(prefill: Callable[..., None], pages: Pages, n_heads: int, width: int) -> None:
    """Short and long steps, few requests and many; over quantized pages also with keys before the new ones."""
    n_kv_heads = pages.data.shape[1]
    group = n_heads // n_kv_heads
    few_rows = max(16, triton.next_power_of_2(group)) // group
    for n_requests in (1, -(-programs_wanted(pages) // n_kv_heads)):
        for n_new in (1, few_rows + 1):
            query = _heads(n_requests * n_new, n_heads, pages)
            key = _heads(max(len(query), 1025), n_kv_heads, pages)  # some to split, whatever the table holds
            table, lens = _nothing(n_requests, width, pages)
            starts = _starts(n_requests, pages)
            for key_starts in (None,) if pages.layout.quantized is None else (None, starts):
                given = query, key, key, pages, table, starts, lens
                prefill(*given, scale=1.0, out=torch.empty_like(query), key_start_loc=key_starts)
    out, n_splits = _heads(1, n_heads, pages), 2
    while n_splits <= MOST_SPLITS:
        weight = torch.zeros(n_heads, n_splits, device=out.device)
        merge(torch.zeros(*weight.shape, out.shape[2], device=out.device), weight, out)
        n_splits *= 2


def warm_restores(pages: Pages, width: int) -> None:
    """Of quantized pages."""
    layout = pages.layout
    shape = 1, layout.block_size, pages.data.shape[1], layout.head_size
    keys, values = torch.empty(2, *shape, dtype=layout.dtype, device=pages.data.device)
    table, none = _nothing(1, width, pages)
    restore(pages, table, none, none, most_blocks=1, keys=keys, values=values)


def warm_evictions(evict: Callable[..., None], pages: Pages, width: int) -> None:
    """Of pages that keep positions; the rank is the one that they keep."""
    table, lens = _nothing(1, width, pages)
    evict(pages, table, lens, lens, lens, sinks=0, rank="attention" if pages.layout.attention else "age")


def _heads(n_rows: int, n_heads: int, pages: Pages) -> torch.Tensor:
    layout = pages.layout
    return torch.zeros(n_rows, n_heads, layout.head_size, dtype=layout.dtype, device=pages.data.device)


def _nothing(n_requests: int, width: int, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
    """Block table and lengths of requests without tokens."""
    table = torch.zeros(n_requests, width, dtype=torch.int32, device=pages.data.device)
    return table, torch.zeros(n_requests, dtype=torch.int32, device=pages.data.device)


def _starts(n_requests: int, pages: Pages) -> torch.Tensor:
    return torch.zeros(n_requests + 1, dtype=torch.int32, device=pages.data.device)
