"""Steps over pages from which tokens are evicted (`vllm_sparq.retention`).

What a row sees depends on what was evicted before it arrived, so the rows of a step take *turns*: in each, every
request brings the rows that follow one eviction. A step of decodes is one turn, and so is a chunk of a prompt that is
kept in full. `prefill: bounded` has a turn for every segment. Output tokens that are computed again after a preemption
have one each, so that a resumed request evicts as it did before.

A turn evicts before it writes. That order lets the block manager hand over an answering request's spare blocks in the
step that empties them, and it holds for the step as a whole: such a request evicts in the first turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata

from vllm_sparq.attention_backends.steps.arrivals import Arrivals, int32, int64, on_device
from vllm_sparq.attention_backends.steps.policies import by_policy
from vllm_sparq.attention_backends.steps.rows import PagedMetadata, PrefillRows
from vllm_sparq.attention_backends.steps.staged_rows import staged_rows
from vllm_sparq.config import Options
from vllm_sparq.retention import Arrival, Phase, Rank, Retention
from vllm_sparq.scheduler.spec import RetainedSpec


@dataclass(frozen=True)
class Share:
    """Rows ``start:stop`` of the step, which one request brings in one turn; the first at ``position``.

    ``arrival`` is what happens before, and ``recent_from`` the position from which tokens stay whatever their score.
    """

    request: int
    start: int
    stop: int
    position: int
    arrival: Arrival
    recent_from: int
    decodes: bool

    @property
    def seq_len(self) -> int:
        """Slots taken when the rows are there."""
        return self.arrival.kept + self.stop - self.start


@dataclass(frozen=True)
class Eviction:
    """Arguments of the evict op; ``most_kept`` bounds ``kept_lens``."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    kept_lens: torch.Tensor
    recent_from: torch.Tensor
    sinks: int
    rank: Rank
    most_kept: int


@dataclass(frozen=True)
class Turn:
    """Rows to write and attend together, after an eviction; ``rows`` is int64, or None for all rows in their order."""

    rows: torch.Tensor | None
    eviction: Eviction | None
    step: PagedMetadata


@dataclass(frozen=True)
class EvictingMetadata(AttentionMetadata):
    """One step of one KV cache group."""

    turns: tuple[Turn, ...]


def answer_turn(
    arrivals: Arrivals,
    step: CommonAttentionMetadata,
    spec: RetainedSpec,
    max_model_len: int,
    policies: Sequence[Options | None],
) -> EvictingMetadata:
    """A step of decodes: one turn, planned without knowing how many tokens go, so that a CUDA graph can hold it."""
    table, n_blocks = step.block_table_tensor, answer_blocks(spec, max_model_len)
    eviction = Eviction(
        block_table=table,
        seq_lens=arrivals.held,
        kept_lens=arrivals.kept,
        recent_from=arrivals.recent_from,
        sinks=spec.retention.sinks,
        rank=spec.retention.rank,
        most_kept=n_blocks * spec.block_size,
    )
    rows = PagedMetadata(
        n_decodes=step.num_reqs,
        block_table=table[:, :n_blocks],
        query_start_loc=step.query_start_loc,
        seq_lens=arrivals.seq_lens,
        first_positions=arrivals.positions,
        by_policy=by_policy(policies, table[:, :n_blocks], arrivals.seq_lens),
    )
    return EvictingMetadata((Turn(rows=None, eviction=eviction, step=rows),))


def answer_blocks(spec: RetainedSpec, max_model_len: int) -> int:
    """Most blocks of a request that answers, after its eviction."""
    return -(-spec.retention.budget_of(max_model_len) // spec.block_size) + spec.n_staging_pages


def plan_turns(
    starts: list[int],
    seq_lens: list[int],
    prompt_lens: list[int],
    phases: list[Phase | None],
    retention: Retention,
) -> list[list[Share]]:
    """The turns of a step, decodes first in each.

    Args:
        starts: B + 1; request b owns rows ``starts[b] : starts[b + 1]``.
        seq_lens: B; tokens of each request so far, evicted and new ones included.
        prompt_lens: B.
        phases: B; the shrunk budget of a request, or None.
        retention: numbers of the engine.
    """
    turns: list[list[Share]] = []
    for request, seq_len in enumerate(seq_lens):
        row, stop = starts[request], starts[request + 1]
        position, prompt_len, phase = seq_len - (stop - row), prompt_lens[request], phases[request]
        turn = 0
        while row < stop:
            n_rows = min(stop - row, retention.next_cut(position, prompt_len) - position)
            answers = position >= prompt_len
            budget = phase.budget if phase is not None and answers else retention.budget_of(prompt_len)
            share = Share(
                request=request,
                start=row,
                stop=row + n_rows,
                position=position,
                arrival=retention.arrival(position, prompt_len, phase),
                recent_from=position + 1 - retention.recent_of(budget),
                decodes=answers,
            )
            if turn == len(turns):
                turns.append([])
            turns[turn].append(share)
            turn, row, position = turn + 1, row + n_rows, position + n_rows
    for shares in turns:
        shares.sort(key=lambda share: not share.decodes)
    return turns


def take_turns(
    turns: list[list[Share]],
    block_table: torch.Tensor,
    spec: RetainedSpec,
    options: Options,
    policies: Sequence[Options | None],
    restored_pages: int,
) -> EvictingMetadata:
    """The turns as tensors, for the layers of a step with this block table (int32 [B, M]) and requests' choices [B].

    ``restored_pages``: see `staged_rows`.
    """
    in_order = len(turns) == 1 and all(a.stop == b.start for a, b in zip(turns[0], turns[0][1:], strict=False))
    how = policies, in_order, restored_pages
    return EvictingMetadata(tuple(_turn(shares, block_table, spec, options, *how) for shares in turns))


def _turn(
    shares: list[Share],
    block_table: torch.Tensor,
    spec: RetainedSpec,
    options: Options,
    policies: Sequence[Options | None],
    in_order: bool,
    restored_pages: int,
) -> Turn:
    device = block_table.device
    requests = [share.request for share in shares]
    every = in_order and requests == list(range(len(block_table)))
    table = block_table if every else block_table[int64(requests, device)]
    rows = (
        None
        if in_order
        else on_device(torch.cat([torch.arange(share.start, share.stop) for share in shares]), torch.int64, device)
    )
    starts = [0]
    for share in shares:
        starts.append(starts[-1] + share.stop - share.start)
    n_decodes = sum(share.decodes for share in shares)
    seq_lens, query_start_loc = [share.seq_len for share in shares], int32(starts, device)
    prefill = None
    if n_decodes < len(shares):
        if spec.n_staging_pages:
            prefill, _ = staged_rows(starts, seq_lens, table, n_decodes, None, spec, options, restored_pages)
        else:
            prefill = PrefillRows(
                block_table=table[n_decodes:],
                query_start_loc=query_start_loc[n_decodes:],
                context_lens=int32([share.arrival.kept for share in shares[n_decodes:]], device),
                seq_lens=int32(seq_lens[n_decodes:], device),
                max_query_len=max(share.stop - share.start for share in shares[n_decodes:]),
                max_seq_len=max(seq_lens[n_decodes:]),
            )
    lens = int32(seq_lens, device)
    step = PagedMetadata(
        n_decodes=n_decodes,
        block_table=table,
        query_start_loc=query_start_loc,
        seq_lens=lens,
        prefill=prefill,
        first_positions=int32([share.position for share in shares], device),
        by_policy=by_policy([policies[request] for request in requests[:n_decodes]], table, lens),
    )
    eviction = None
    if any(share.arrival.n_evicted for share in shares):
        eviction = Eviction(
            block_table=table,
            seq_lens=int32([share.arrival.held for share in shares], device),
            kept_lens=int32([share.arrival.kept for share in shares], device),
            recent_from=int32([share.recent_from for share in shares], device),
            sinks=spec.retention.sinks,
            rank=spec.retention.rank,
            most_kept=max(share.arrival.kept for share in shares),
        )
    return Turn(rows=rows, eviction=eviction, step=step)
