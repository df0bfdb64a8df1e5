"""Steps over quantized pages, whose newest block is staged (`vllm_sparq.layout`).

A row of a prompt sees the tokens of its own block as the model made them, and all earlier blocks as their codes: what
the same row would see if it were decoded alone. So what a request answers depends neither on how its prompt was cut
into chunks, nor on what the prefix cache held, nor on preemption (unless `Options.chunk` asks for it; on CUDA but for
rounding, since how many rows come together decides which kernel reads them). Two things follow:

* A chunk is attended to in *pieces* that end at block boundaries. The tokens that a begun block already has are staged
  where the chunk's own codes will go: they are copied out before the write (`BegunBlocks`).
* Rows after the prompt are read again by the read policy, each at its own length, over pages in which its block is
  staged once more (`StagedReplay`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparq.attention_backends.steps.arrivals import int64, on_device
from vllm_sparq.layout import Pages


@dataclass(frozen=True)
class Piece:
    """New tokens of one request in one block: rows ``start:stop`` of the step, the last of ``n_keys`` of the block."""

    request: int
    block: int
    start: int
    stop: int
    n_keys: int

    @property
    def n_begun(self) -> int:
        """Tokens of the block that were there before the step."""
        return self.n_keys - (self.stop - self.start)


@dataclass(frozen=True)
class BegunBlocks:
    """Staged tokens to put in front of the new ones: place ``places[i]`` of page ``pages[i]`` becomes row ``rows[i]``.

    Attributes:
        pages, places, rows: int64 [n].
        new_rows: int64 [T'], the rows that the step's new tokens, from ``first`` on, become.
    """

    pages: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    new_rows: torch.Tensor
    first: int

    def with_new(self, pages: Pages, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [n + T', G, D] of the begun blocks' tokens and the new ones ([T, G, D]), in the order of requests."""
        staged = pages.staged[self.pages, :, self.places]  # [n, G, 2, D]
        n_new = len(self.new_rows)
        joined = []
        for i, new in enumerate((key, value)):
            rows = new.new_empty(len(self.rows) + n_new, *new.shape[1:])
            rows[self.rows] = staged[:, :, i]
            rows[self.new_rows] = new[self.first : self.first + n_new]
            joined.append(rows)
        return joined[0], joined[1]


@dataclass(frozen=True)
class StagedReplay:
    """Pages in which the blocks of replayed rows are staged once more; a rare step, so plain copies will do.

    Attributes:
        source: int64 [n], pages of the cache that the rows look at.
        n_pages: pages to make room for, those of ``source`` first.
        pages, places, rows: int64 [n'], row ``rows[i]`` of the new K and V goes to place ``places[i]`` of ``pages[i]``.
    """

    source: torch.Tensor
    n_pages: int
    pages: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor

    def staged_again(self, cache: Pages, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """The pages that the replayed rows' block table speaks of."""
        data = cache.data.new_empty(self.n_pages, *cache.data.shape[1:])
        data[: len(self.source)] = cache.data[self.source]
        pages = Pages(data, cache.layout)
        pages.staged[self.pages, :, self.places] = torch.stack([key[self.rows], value[self.rows]], 2)
        return pages


def cut_pieces(starts: list[int], seq_lens: list[int], first_request: int, block_size: int) -> list[Piece]:
    """The new tokens of all requests from ``first_request`` on, cut at block boundaries; ``starts`` has B + 1 rows."""
    pieces = []
    for request in range(first_request, len(seq_lens)):
        row, stop = starts[request], starts[request + 1]
        position = seq_lens[request] - (stop - row)
        while row < stop:
            block, slot = divmod(position, block_size)
            n = min(block_size - slot, stop - row)
            pieces.append(Piece(request, block, row, row + n, slot + n))
            row, position = row + n, position + n
    return pieces


def begun_blocks(
    pieces: list[Piece], block_table: torch.Tensor, staged_per_page: int
) -> tuple[BegunBlocks, list[int]] | None:
    """What to copy out before the write, and the first row of each piece's keys then (with the end: one more).

    None where no chunk begins inside a block: keys are the new tokens alone.
    """
    if not any(piece.n_begun for piece in pieces):
        return None
    requests: list[int] = []
    columns: list[int] = []
    places: list[int] = []
    rows: list[int] = []
    new_rows: list[int] = []
    key_starts = [0]
    for piece in pieces:
        row = key_starts[-1]
        for slot in range(piece.n_begun):
            ahead, place = divmod(slot, staged_per_page)
            requests.append(piece.request)
            columns.append(piece.block + 1 + ahead)
            places.append(place)
        rows += range(row, row + piece.n_begun)
        new_rows += range(row + piece.n_begun, row + piece.n_keys)
        key_starts.append(row + piece.n_keys)
    device = block_table.device
    pages = block_table[int64(requests, device), int64(columns, device)].long()
    begun = BegunBlocks(
        pages, int64(places, device), int64(rows, device), int64(new_rows, device), first=pieces[0].start
    )
    return begun, key_starts


def staged_replay(
    pieces: list[Piece], key_starts: list[int], rows: list[int], block_table: torch.Tensor, staged_per_page: int
) -> tuple[StagedReplay, torch.Tensor]:
    """How to stage the blocks of the step's ``rows`` once more, and the rows' block table [len(rows), M] then.

    ``key_starts``: first row of each piece's keys among all keys.
    """
    owner = {row: i for i, piece in enumerate(pieces) for row in range(piece.start, piece.stop)}
    touched = sorted({owner[row] for row in rows})
    n_blocks: dict[int, int] = {}  # of each request that is looked at
    for i in touched:
        n_blocks[pieces[i].request] = pieces[i].block + 1
    n_staging = -(-max(pieces[i].n_keys for i in touched) // staged_per_page)
    first_page, n_source = {}, 0
    for request, n in n_blocks.items():
        first_page[request] = n_source
        n_source += n
    staging = {i: n_source + n_staging * at for at, i in enumerate(touched)}
    table = torch.zeros(len(rows), max(n_blocks.values()) + n_staging, dtype=torch.int32)
    for line, row in enumerate(rows):
        piece, i = pieces[owner[row]], owner[row]
        known = piece.block + 1
        table[line, :known] = torch.arange(known) + first_page[piece.request]
        table[line, known : known + n_staging] = torch.arange(n_staging) + staging[i]
    slots = [
        (staging[i] + slot // staged_per_page, slot % staged_per_page, key_starts[i] + slot)
        for i in touched
        for slot in range(pieces[i].n_keys)
    ]
    device = block_table.device
    replay = StagedReplay(
        source=torch.cat([block_table[request, :n] for request, n in n_blocks.items()]).long(),
        n_pages=n_source + n_staging * len(touched),
        pages=int64([page for page, _, _ in slots], device),
        places=int64([place for _, place, _ in slots], device),
        rows=int64([row for _, _, row in slots], device),
    )
    return replay, on_device(table, torch.int32, device)
