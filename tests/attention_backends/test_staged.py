"""Steps over quantized pages: every row reads what it would read if its request were decoded alone, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.attention_backends.test_builder import Known, step
from vllm_sparq.attention_backends.flash import restored_cache
from vllm_sparq.attention_backends.steps import restored
from vllm_sparq.attention_backends.steps.builder import PagedMetadataBuilder
from vllm_sparq.attention_backends.steps.restored import RestorePlan, plan_restores
from vllm_sparq.attention_backends.steps.rows import PagedMetadata
from vllm_sparq.attention_backends.steps.staged import Piece, cut_pieces
from vllm_sparq.config import Options
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.reference import dense_decode
from vllm_sparq.ops.prefill.reference import context_tokens, prefill
from vllm_sparq.ops.restore.reference import restore
from vllm_sparq.ops.write.reference import write
from vllm_sparq.scheduler.spec import page_spec

N, G, H, D = 16, 2, 4, 16
LAYOUT = PageLayout(head_size=D, block_size=N, dtype=torch.float32, format="kivi2", group_size=16)
M = 8 + LAYOUT.n_staging_blocks


@dataclass
class Batch:
    """Requests of (new tokens, context length with them, prompt length), K, V and q of all their tokens [S, *, D]."""

    requests: tuple[tuple[int, int, int], ...]
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    query: list[torch.Tensor]

    @classmethod
    def of(cls, *requests: tuple[int, int, int]) -> Batch:
        gen = torch.Generator().manual_seed(len(requests))

        def random(heads: int) -> list[torch.Tensor]:
            return [torch.randn(s, heads, D, generator=gen) for _, s, _ in requests]

        return cls(requests, random(G), random(G), random(H))

    @property
    def table(self) -> torch.Tensor:
        gen = torch.Generator().manual_seed(5)
        return torch.randperm(M * len(self.requests), generator=gen).int().view(-1, M)

    def new(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x[s - t : s] for x, (t, s, _) in zip(tensors, self.requests, strict=True)])

    def pages(self) -> Pages:
        """With the tokens before the step."""
        pages = Pages(torch.full((M * len(self.requests), G, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8), LAYOUT)
        for i, (t, s, _) in enumerate(self.requests):
            extend(pages, self.table[i : i + 1], self.key[i][: s - t], self.value[i][: s - t], s - t)
        return pages

    def step(self) -> Any:
        """As vLLM's V1 runner describes it."""
        common = step(*self.requests)
        common.block_table_tensor = self.table
        return common


def extend(pages: Pages, table: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int) -> None:
    starts = torch.tensor([0, len(key)], dtype=torch.int32)
    write(key, value, pages, table, starts, torch.tensor([length], dtype=torch.int32))


def alone(batch: Batch) -> torch.Tensor:
    """[T, H, D]: each new token of each request, after every token of it was written by itself."""
    rows = []
    for i, (t, s, _) in enumerate(batch.requests):
        pages = Pages(torch.full((M, G, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8), LAYOUT)
        table = torch.arange(M, dtype=torch.int32)[None]
        for p in range(s):
            extend(pages, table, batch.key[i][p : p + 1], batch.value[i][p : p + 1], p + 1)
            if p >= s - t:
                out = torch.empty(1, H, D)
                length = torch.tensor([p + 1], dtype=torch.int32)
                dense_decode(batch.query[i][p : p + 1], pages, table, length, scale=0.25, out=out)
                rows.append(out)
    return torch.cat(rows)


def paged_attention(query: torch.Tensor, cache: tuple[torch.Tensor, ...], rows: RestorePlan, out: torch.Tensor) -> None:
    """What FlashAttention computes over pages [P', N, G, D]: the rows of a request are the last of its tokens."""
    starts = rows.query_start_loc.tolist()
    for q, length in enumerate(rows.seq_lens.tolist()):
        mine = slice(starts[q], starts[q + 1])
        key, value = (
            part[rows.block_table[q].long()].flatten(0, 1)[:length].repeat_interleave(H // G, 1) for part in cache
        )
        logits = 0.25 * torch.einsum("thd,shd->hts", query[mine], key)
        ahead = torch.ones_like(logits, dtype=torch.bool).triu(length - (mine.stop - mine.start) + 1)
        weights = logits.masked_fill(ahead, -torch.inf).softmax(-1)
        out[mine] = torch.einsum("hts,shd->thd", weights, value)


def run(batch: Batch, restored_pages: int = 0, **options: Any) -> tuple[torch.Tensor, PagedMetadata]:
    """[T, H, D] of the step, as `PagedImpl.forward` computes it; with so many pages at a time restored from codes."""
    builder = object.__new__(PagedMetadataBuilder)
    builder.options, builder.requests, builder.restored_pages = Options(**options), Known(), restored_pages
    plain = FullAttentionSpec(block_size=N, num_kv_heads=G, head_size=D, dtype=torch.float32)
    builder.kv_cache_spec = page_spec(plain, LAYOUT)
    step, pages = builder.build(0, batch.step()), batch.pages()
    key, value, query = batch.new(batch.key), batch.new(batch.value), batch.new(batch.query)
    out, new = torch.full_like(query, torch.nan), (key, value)
    rows = step.prefill
    if rows is not None and rows.begun is not None:
        new = rows.begun.with_new(pages, key, value)
    write(key, value, pages, step.block_table, step.query_start_loc, step.seq_lens)
    if rows is not None and rows.restores is not None:
        room = torch.full((2, restored_pages * N * G * D), torch.nan)
        for plan in rows.restores:
            paged_attention(query, restored_cache(plan, pages, *new, list(room), restore), plan, out)
    elif rows is not None:
        tables = rows.block_table, rows.query_start_loc, rows.context_lens
        prefill(query, *new, pages, *tables, scale=0.25, out=out, key_start_loc=rows.key_start_loc)
    n = step.n_decodes
    dense_decode(query[:n], pages, step.block_table, step.seq_lens, scale=0.25, out=out[:n])
    if step.replayed is not None:
        again = step.replayed
        seen, its = again.pages_seen(pages, *new), torch.empty(len(again.rows), H, D)
        dense_decode(query[again.rows], seen, again.block_table, again.seq_lens, scale=0.25, out=its)
        if builder.options.chunk == "codes":
            torch.testing.assert_close(out[again.rows], its)  # a dense read says the same either way
        out[again.rows] = its
    return out, step


STEPS = {
    "fresh": [(20, 20, 40)],
    "decodes": [(1, 17, 16), (1, 16, 15), (1, 33, 5)],
    "mixed": [(1, 40, 20), (5, 5, 5), (50, 50, 60), (16, 16, 16)],
    "begun blocks": [(30, 40, 64), (3, 13, 20), (16, 32, 33), (1, 20, 20), (40, 100, 100)],
    "replayed": [(1, 9, 8), (33, 40, 10), (20, 50, 45), (7, 7, 4)],
}


@pytest.mark.parametrize("requests", STEPS.values(), ids=STEPS)
def test_rows_read_what_they_would_read_alone(requests: list[tuple[int, int, int]]) -> None:
    batch = Batch.of(*requests)
    found, _ = run(batch)
    torch.testing.assert_close(found, alone(batch))


@pytest.mark.parametrize("chunk", ["codes", "exact"])
@pytest.mark.parametrize("n_pages", [100, 10], ids=["one call", "several calls"])
@pytest.mark.parametrize("name", [name for name in STEPS if name != "decodes"])
def test_restored_blocks_are_seen_as_codes_are(
    name: str, n_pages: int, chunk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest request needs ten pages: six that are restored, and four for its own tokens."""
    monkeypatch.setattr(restored, "FEWEST_ROWS", 0)
    batch = Batch.of(*STEPS[name])
    found, step = run(batch, n_pages, chunk=chunk)
    assert step.prefill is not None
    assert step.prefill.restores is not None
    several = {("begun blocks", "codes"), ("begun blocks", "exact"), ("replayed", "codes")}
    assert len(step.prefill.restores) == 1 + (n_pages == 10 and (name, chunk) in several)
    torch.testing.assert_close(found, run(batch, chunk=chunk)[0])


def test_codes_are_read_where_restoring_does_not_pay() -> None:
    """Few rows for all that would be restored; or more pages than there is room for."""

    def seen(*rows_after_blocks: tuple[int, int]) -> list[restored.SeenTokens]:
        found, row = [], 0
        for request, (n, blocks) in enumerate(rows_after_blocks):
            found.append(restored.SeenTokens(request, blocks, row, row + n, row, row + n))
            row += n
        return found

    table = torch.zeros(3, 200, dtype=torch.int32)
    assert plan_restores(seen((256, 100)), table, N, 200) is not None
    assert plan_restores(seen((255, 100)), table, N, 200) is None
    assert plan_restores(seen((300, 100), (100, 20)), table, N, 200) is not None
    assert plan_restores(seen((300, 100), (100, 90)), table, N, 200) is None
    assert plan_restores(seen((256, 185)), table, N, 200) is None
    assert plan_restores(seen((5, 0)), table, N, 200) is not None
    three = plan_restores(seen((5, 0), (2000, 60), (2000, 60)), table, N, 200)
    assert three is not None
    assert [(call.n_restored, call.n_pages, len(call.seq_lens)) for call in three] == [(60, 186, 2), (60, 185, 1)]


def test_an_exact_chunk_is_seen_as_it_is() -> None:
    """Rows 20 to 49 over one block of codes, and their own 34 tokens (4 of them begun before) in full precision."""
    batch = Batch.of((30, 50, 60), (1, 20, 20))
    found, step = run(batch, chunk="exact")
    assert step.prefill is not None
    assert step.prefill.context_lens.tolist() == [16, 16]
    assert step.prefill.key_start_loc is not None
    assert step.prefill.key_start_loc.tolist() == [0, 34, 38]
    codes, _ = run(batch)
    torch.testing.assert_close(found[:12], codes[:12])  # the rest of the begun block: nothing full in between
    assert (found[12:30] - codes[12:30]).abs().amax((1, 2)).min() > 1e-3
    pages = batch.pages()
    old = context_tokens(pages, batch.table[0], 16, 0)
    keys, values = (torch.cat([a, b[0][16:, 0]]) for a, b in zip(old, (batch.key, batch.value), strict=True))
    logits = 0.25 * batch.query[0][49, :2] @ keys.T
    torch.testing.assert_close(found[29, :2], torch.softmax(logits, -1) @ values)


def test_pieces_by_hand() -> None:
    # Request 0 is a decode. Request 1 brings positions 10 to 36, rows 1 to 27: to 15, to 31, and 32 to 36.
    assert cut_pieces([0, 1, 28], [9, 37], 1, 16) == [
        Piece(1, 0, 1, 7, 16),
        Piece(1, 1, 7, 23, 16),
        Piece(1, 2, 23, 28, 5),
    ]
    assert cut_pieces([0, 16], [16], 0, 16) == [Piece(0, 0, 0, 16, 16)]


def test_aligned_chunks_copy_nothing() -> None:
    _, step = run(Batch.of((20, 36, 60), (16, 16, 16)))
    assert step.prefill is not None
    assert step.prefill.begun is None
    assert step.prefill.key_start_loc is None
    assert step.prefill.context_lens.tolist() == [16, 32, 0]
    assert step.prefill.query_start_loc.tolist() == [0, 16, 20, 36]
