"""Prompts over quantized pages as FlashAttention takes them: a cache in the model's type, restored for a layer's call.

A row of a prompt sees earlier blocks as their codes and its own as the model made it (`.staged`). So the blocks of a
request that have codes are restored once, and each piece of its prompt gets a page of its own for the tokens of its
block; the piece's block table names the former, then the latter. Then one causal call is the whole of the attention:
nothing is merged, and a sink or a soft cap counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from vllm_sparq.attention_backends.steps.arrivals import int32, int64, on_device

FEWEST_ROWS = 256
"""Rows of a prompt, for each token before them, from which restoring pays. Not measured: a token is read from its
codes, written and read again, eight times the bytes of an int4 one, in which time FlashAttention gets through about 110
rows with it on an H100; our own kernel, which reads codes, was predicted to need half as long again."""

MOST_BYTES = 1 << 30
"""Of the restored pages of a layer's call; a step that needs more is cut, and a longer request reads codes."""


@dataclass(frozen=True)
class SeenTokens:
    """Rows ``start:stop`` of a request, and the tokens ``key_start:key_stop`` of the step's K, the last of them theirs.

    They see ``n_blocks`` blocks before these tokens.
    """

    request: int
    n_blocks: int
    start: int
    stop: int
    key_start: int
    key_stop: int

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    @property
    def n_keys(self) -> int:
        return self.key_stop - self.key_start

    def seq_len(self, block_size: int) -> int:
        """Tokens up to the last of its rows."""
        return self.n_blocks * block_size + self.n_keys

    def own_pages(self, block_size: int) -> int:
        """Pages that its own tokens take."""
        return -(-self.n_keys // block_size)


@dataclass(frozen=True)
class RestorePlan:
    """One call: some of a step's prompts.

    Attributes:
        requests: int32 [R, M], the blocks of each that are restored first; n_blocks, first_pages: int32 [R], how many,
            and where to; most_blocks: bound of ``n_blocks``.
        n_restored: pages restored; n_pages: with those for the rows' own tokens.
        keys: those of the step's K and V that get pages of their own: ``pages[i]``, ``places[i]``, int64 [n].
        block_table: int32 [Q, M'], of the restored cache; query_start_loc: int32 [Q + 1]; seq_lens: int32 [Q].
        max_query_len, max_seq_len: the largest of them.
    """

    requests: torch.Tensor
    n_blocks: torch.Tensor
    first_pages: torch.Tensor
    most_blocks: int
    n_restored: int
    n_pages: int
    keys: slice
    pages: torch.Tensor
    places: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int


def room_to_restore(vllm_config: Any, block_size: int, token_bytes: int) -> int:
    """Tokens that a layer's call may restore: those of a request as long as the model takes, within `MOST_BYTES`.

    Args:
        block_size: N, of our pages.
        token_bytes: of K and V of a token, in all KV heads.
    """
    longest = vllm_config.model_config.max_model_len + vllm_config.scheduler_config.max_num_batched_tokens
    partial = 2 * block_size  # a page that was begun, and one that is not full
    return int(min(longest + partial, MOST_BYTES // token_bytes))


def plan_restores(
    seen: list[SeenTokens], block_table: torch.Tensor, block_size: int, most_pages: int
) -> tuple[RestorePlan, ...] | None:
    """The calls for a step's prompts; None where our own kernel reads codes: few rows, or a request of too many pages.

    Args:
        seen: in the order of their rows, those of a request together.
        block_table: int32 [B, M], of the step.
        most_pages: of a call.
    """
    requests = list(_by_request(seen))
    n_codes = sum(of_one[-1].n_blocks for of_one in requests)
    n_looked_at = sum(piece.n_rows * piece.n_blocks for piece in seen)
    if n_looked_at < FEWEST_ROWS * n_codes or any(_n_pages(of_one, block_size) > most_pages for of_one in requests):
        return None
    calls: list[list[list[SeenTokens]]] = []
    room = 0
    for of_one in requests:
        needs = _n_pages(of_one, block_size)
        if needs > room or not calls:
            calls.append([])
            room = most_pages
        calls[-1].append(of_one)
        room -= needs
    return tuple(_call(together, block_table, block_size) for together in calls)


def _by_request(seen: list[SeenTokens]) -> Iterator[list[SeenTokens]]:
    first = 0
    for i, piece in enumerate(seen):
        if i + 1 == len(seen) or seen[i + 1].request != piece.request:
            yield seen[first : i + 1]
            first = i + 1


def _n_pages(of_one: list[SeenTokens], block_size: int) -> int:
    """Pages that a request needs. Its last piece sees the most blocks."""
    return of_one[-1].n_blocks + sum(piece.own_pages(block_size) for piece in of_one)


def _call(requests: list[list[SeenTokens]], block_table: torch.Tensor, block_size: int) -> RestorePlan:
    device = block_table.device
    n_blocks = [of_one[-1].n_blocks for of_one in requests]
    *first_pages, n_restored = accumulate(n_blocks, initial=0)
    pieces = [(piece, first) for of_one, first in zip(requests, first_pages, strict=True) for piece in of_one]
    own_page, own_pages, slots = n_restored, [], []
    for piece, _ in pieces:
        own_pages.append(own_page)
        slots.append(own_page * block_size + torch.arange(piece.n_keys))
        own_page += piece.own_pages(block_size)
    lens = [piece.seq_len(block_size) for piece, _ in pieces]
    before = int32([piece.n_blocks for piece, _ in pieces], device)[:, None]
    restored, own = (int32(pages, device)[:, None] for pages in ([first for _, first in pieces], own_pages))
    n_columns = -(-max(lens) // block_size) + 1  # FlashAttention 2 may look at one more than it needs
    column = torch.arange(n_columns, dtype=torch.int32, device=device)
    slot = torch.cat(slots)
    return RestorePlan(
        requests=block_table[int64([of_one[0].request for of_one in requests], device)],
        n_blocks=int32(n_blocks, device),
        first_pages=int32(first_pages, device),
        most_blocks=max(n_blocks),
        n_restored=n_restored,
        n_pages=own_page,
        keys=slice(pieces[0][0].key_start, pieces[-1][0].key_stop),
        pages=on_device(slot // block_size, torch.int64, device),
        places=on_device(slot % block_size, torch.int64, device),
        block_table=torch.where(column < before, restored + column, own + column - before).clamp(max=own_page - 1),
        query_start_loc=int32([piece.start for piece, _ in pieces] + [pieces[-1][0].stop], device),
        seq_lens=int32(lens, device),
        max_query_len=max(piece.n_rows for piece, _ in pieces),
        max_seq_len=max(lens),
    )
