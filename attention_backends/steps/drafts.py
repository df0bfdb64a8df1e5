"""Rows of requests that bring several tokens after their prompt: each a decode of its own, at its own length.

A draft that is verified sees what it would see if it were decoded alone. So the tables of the requests become tables of
rows, worked out on the device into tensors that stay in their place, where a captured CUDA graph finds them.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_sparq.attention_backends.steps.rows import DraftRows


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
