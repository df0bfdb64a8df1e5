"""The rows of a step over quantized pages: in pieces, with what is staged for them (see `.staged`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_sparq.attention_backends.steps.arrivals import int32, int64
from vllm_sparq.attention_backends.steps.restored import SeenTokens, plan_restores
from vllm_sparq.attention_backends.steps.rows import PrefillRows, ReplayedRows
from vllm_sparq.attention_backends.steps.staged import begun_blocks, cut_pieces, staged_replay
from vllm_sparq.config import Options
from vllm_sparq.scheduler.spec import StagedSpec


def staged_rows(
    starts: list[int],
    seq_lens: list[int],
    table: torch.Tensor,
    n_decodes: int,
    replayed: ReplayedRows | None,
    spec: StagedSpec,
    options: Options,
    restored_pages: int,
) -> tuple[PrefillRows, ReplayedRows | None]:
    """Rows of the requests after the first ``n_decodes``, which own rows ``starts[b] : starts[b + 1]`` of the step.

    ``seq_lens`` are their contexts, new tokens included, and ``table`` the block table of the step. ``restored_pages``
    may be restored from codes for a layer's call; 0 where the layers read codes.
    """
    pieces = cut_pieces(starts, seq_lens, n_decodes, spec.block_size)
    per_page = spec.staged_per_page
    begun = begun_blocks(pieces, table, per_page)
    cuts = [piece.start for piece in pieces] + [pieces[-1].stop]
    key_starts = cuts if begun is None else begun[1]
    if replayed is not None:
        staged, its_table = staged_replay(pieces, key_starts, replayed.rows_on_host, table, per_page)
        replayed = replace(replayed, staged=staged, block_table=its_table)
    # Rows that may see their whole chunk as it is need no cut: a request is one piece, from its first block on.
    firsts = [i for i, piece in enumerate(pieces) if i == 0 or piece.request != pieces[i - 1].request]
    begins = list(range(len(pieces))) if options.chunk == "codes" else firsts
    seen = [
        SeenTokens(pieces[i].request, pieces[i].block, cuts[i], cuts[end], key_starts[i], key_starts[end])
        for i, end in zip(begins, [*begins[1:], len(pieces)], strict=True)
    ]
    longest = max(seen, key=lambda one: one.n_rows)
    device, lens = table.device, [one.seq_len(spec.block_size) for one in seen]
    prefill = PrefillRows(
        block_table=table[int64([one.request for one in seen], device)],
        query_start_loc=int32([*(one.start for one in seen), seen[-1].stop], device),
        context_lens=int32([one.n_blocks * spec.block_size for one in seen], device),
        seq_lens=int32(lens, device),
        max_query_len=longest.n_rows,
        max_seq_len=max(lens),
        key_start_loc=None if begun is None else int32([*(one.key_start for one in seen), seen[-1].key_stop], device),
        begun=None if begun is None else begun[0],
        longest=(longest.start, longest.stop),
        restores=plan_restores(seen, table, spec.block_size, restored_pages) if restored_pages else None,
    )
    return prefill, replayed
