"""Rows of drafts: of requests that have several verified, and of heads that draft one token after the other.

Where a request brings several tokens after its prompt, each is a decode of its own, at its own length: a draft that is
verified sees what it would see if it were decoded alone. So the tables of the requests become tables of rows, worked
out on the device into tensors that stay in their place, where a captured CUDA graph finds them.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparq.attention_backends.steps.rows import DraftRows, PagedMetadata

NULL_BLOCK = 0
"""The block that vLLM's block pool never gives to a request."""


class DraftTables:
    """Block tables and lengths by row.

    Args:
        n_rows: most of a step.
        device: where kernels look for them.
    """

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self._index = torch.arange(n_rows, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(n_rows, 0, dtype=torch.int32, device=device)

    def of(self, step: CommonAttentionMetadata, n_requests: int) -> tuple[int, DraftRows | None]:
        """How many rows the first ``n_requests`` of a step bring, and their tables; None where they bring one each.

        A step of nothing else may be padded: its rows are as many as a graph was captured for.
        """
        whole = n_requests == step.num_reqs
        n_rows = step.num_actual_tokens if whole else int(step.query_start_loc_cpu[n_requests])
        if n_rows <= n_requests or n_requests == 0:
            return n_requests, None
        width = step.block_table_tensor.shape[1]
        if not self._table.shape[1]:
            self._table = self._table.new_zeros(len(self._index), width)
        starts, index = step.query_start_loc[: n_requests + 1], self._index[:n_rows]
        request = torch.searchsorted(starts[1:], index, right=True).clamp(max=n_requests - 1)
        seen = step.seq_lens[request] - (starts[request + 1] - 1 - index)
        lens, table = self._seq_lens[:n_rows], self._table[:n_rows]
        torch.where(index < starts[-1], seen, torch.zeros_like(seen), out=lens)
        torch.index_select(step.block_table_tensor, 0, request, out=table)
        return n_rows, DraftRows(table, lens)


def drafted_rows(step: CommonAttentionMetadata, n_drafted: int, page_tokens: int | None) -> PagedMetadata:
    """A step of a drafting head with KV caches of its own, which brings the token that it drafted last.

    What it writes must be taken back where the draft is rejected, so it may neither fill a quantized page nor leave it.
    A row that would, or that vLLM has sent back to the first token for want of positions, goes to vLLM's null block,
    whose content nobody looks at; the scheduler drops what is drafted from there (`vllm_sparq.scheduler.drafting`).

    Args:
        step: one row of each request; vLLM goes on with it, so it stays as it is.
        n_drafted: tokens of a row's context that nobody has verified.
        page_tokens: of a quantized page; None where blocks are not quantized.
    """
    unverified, last = step.seq_lens - n_drafted, step.seq_lens - 1  # the first such position, and the row's own
    is_lost = unverified < 1
    if page_tokens is not None:
        is_lost |= (unverified // page_tokens != last // page_tokens) | (last % page_tokens == page_tokens - 1)
    return PagedMetadata(
        n_decodes=step.num_reqs,
        block_table=step.block_table_tensor.masked_fill(is_lost[:, None], NULL_BLOCK),
        query_start_loc=step.query_start_loc,
        seq_lens=step.seq_lens.masked_fill(is_lost, 1),
    )
