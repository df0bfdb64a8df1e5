"""Which rows of a step are read how; worked out once per step and cache group, shared by all its layers.

Three kinds of rows:

* *decodes*: requests with one new token behind their prompt. They come first (the runner sorts the batch) and are read
  by the read policy.
* *prefill rows*: tokens of a prompt, in chunks. Always dense, however short the chunk, so that what a request answers
  does not depend on how its prompt was cut.
* *replayed rows*: several tokens behind the prompt in one step. They are output tokens that are computed again after a
  preemption, or draft tokens to verify. Each is read by the read policy at its own context length, which is what
  happened (or would have happened) when it was decoded alone; so a preempted request goes on with the K and V it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparq.attention_backends.selection import engine_options
from vllm_sparq.attention_backends.staged import (
    BegunBlocks,
    StagedReplay,
    begun_blocks,
    cut_pieces,
    int64,
    staged_replay,
)
from vllm_sparq.config import Options
from vllm_sparq.layout import Pages
from vllm_sparq.scheduler.spec import StagedSpec

prompt_lengths: Callable[[CommonAttentionMetadata], torch.Tensor] | None = None
"""Prompt length of each request of a step, int [B] on the CPU. vLLM's metadata does not carry it; our worker sets this
to ask its model runner. Without it (a worker class of the user's own) a chunk that holds the end of a prompt and output
tokens behind it is read densely as a whole."""


@dataclass(frozen=True)
class PrefillRows:
    """Arguments of the prefill op: requests b with rows ``query_start_loc[b] : query_start_loc[b + 1]`` of the step.

    Over quantized pages they are pieces of requests, and ``begun`` says which staged tokens their keys begin with.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    key_start_loc: torch.Tensor | None = None
    begun: BegunBlocks | None = None


@dataclass(frozen=True)
class ReplayedRows:
    """Arguments of a decode op for single rows of the step: row ``rows[i]`` has ``seq_lens[i]`` tokens to look at."""

    rows: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    staged: StagedReplay | None = None

    def pages_seen(self, pages: Pages, key: torch.Tensor, value: torch.Tensor) -> Pages:
        """The pages that ``block_table`` speaks of, from the cache and what the prefill op was given."""
        return pages if self.staged is None else self.staged.staged_again(pages, key, value)


@dataclass(frozen=True)
class SparqMetadata(AttentionMetadata):
    """One step of one KV cache group.

    Attributes:
        n_decodes: leading requests that are read by the policy, one row each.
        block_table: int32 [B, M]; query_start_loc: int32 [B + 1]; seq_lens: int32 [B], new tokens included.
        prefill: rows to attend densely, or None.
        replayed: rows to read by the policy although their request brings several, or None. They are part of
            ``prefill`` too; what the policy says replaces what the dense pass wrote.
    """

    n_decodes: int
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    prefill: PrefillRows | None = None
    replayed: ReplayedRows | None = None


class SparqMetadataBuilder(AttentionMetadataBuilder[SparqMetadata]):
    """Sorts the rows of a step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.options = engine_options(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparqMetadata:
        step = common_attn_metadata
        n_decodes = count_decodes(step)
        prefill, replayed = None, None
        if n_decodes < step.num_reqs:
            replayed = find_replayed(step, n_decodes)
            if isinstance(self.kv_cache_spec, StagedSpec):
                prefill, replayed = staged_rows(step, n_decodes, replayed, self.kv_cache_spec, self.options)
            else:
                prefill = prefill_rows(step, n_decodes)
        return SparqMetadata(
            n_decodes=n_decodes,
            block_table=step.block_table_tensor,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            prefill=prefill,
            replayed=replayed,
        )


def count_decodes(step: CommonAttentionMetadata) -> int:
    """Leading requests that bring one token behind their prompt (padding requests, which bring none, count as well)."""
    if step.max_query_len > 1 or _any_prefilling(step):
        query_lens = step.query_start_loc_cpu[1:] - step.query_start_loc_cpu[:-1]
        is_decode = query_lens <= 1
        if step.is_prefilling is not None:
            is_decode &= ~step.is_prefilling
        others = (~is_decode).nonzero()
        return int(others[0]) if len(others) else step.num_reqs
    return step.num_reqs


def prefill_rows(step: CommonAttentionMetadata, n_decodes: int) -> PrefillRows:
    """Everything behind the decodes."""
    starts = step.query_start_loc[n_decodes:]
    return PrefillRows(
        block_table=step.block_table_tensor[n_decodes:],
        query_start_loc=starts,
        context_lens=step.seq_lens[n_decodes:] - (starts[1:] - starts[:-1]),
    )


def staged_rows(
    step: CommonAttentionMetadata, n_decodes: int, replayed: ReplayedRows | None, spec: StagedSpec, options: Options
) -> tuple[PrefillRows, ReplayedRows | None]:
    """The same over quantized pages: in pieces, with what is staged for them."""
    seq_lens = _seq_lens_on_cpu(step).tolist()
    pieces = cut_pieces(step.query_start_loc_cpu.tolist(), seq_lens, n_decodes, spec.block_size)
    table, per_page = step.block_table_tensor, spec.staged_per_page
    begun = begun_blocks(pieces, table, per_page)
    starts = [piece.start for piece in pieces] + [pieces[-1].stop]
    key_starts = starts if begun is None else begun[1]
    if replayed is not None:
        rows = replayed.rows.tolist()
        staged, its_table = staged_replay(pieces, key_starts, rows, table, per_page)
        replayed = replace(replayed, staged=staged, block_table=its_table)
    # Rows that may see their whole chunk as it is need no cut: a request is one piece, from its first block on.
    firsts = [i for i, piece in enumerate(pieces) if i == 0 or piece.request != pieces[i - 1].request]
    seen = list(range(len(pieces))) if options.chunk == "codes" else firsts

    def int32(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=table.device)

    prefill = PrefillRows(
        block_table=table[int64([pieces[i].request for i in seen], table.device)],
        query_start_loc=int32([starts[i] for i in (*seen, -1)]),
        context_lens=int32([pieces[i].block * spec.block_size for i in seen]),
        key_start_loc=None if begun is None else int32([key_starts[i] for i in (*seen, -1)]),
        begun=None if begun is None else begun[0],
    )
    return prefill, replayed


def _any_prefilling(step: CommonAttentionMetadata) -> bool:
    return step.is_prefilling is not None and bool(step.is_prefilling.any())


def find_replayed(step: CommonAttentionMetadata, n_decodes: int) -> ReplayedRows | None:
    """The rows behind the decodes whose position is behind their request's prompt."""
    starts = step.query_start_loc_cpu
    query_lens = (starts[1:] - starts[:-1])[n_decodes:]
    n_behind_prompt = _tokens_behind_prompt(step)[n_decodes:].clamp(min=0).minimum(query_lens)
    n_rows = int(n_behind_prompt.sum())
    if n_rows == 0:
        return None
    requests = torch.repeat_interleave(torch.arange(n_decodes, step.num_reqs), n_behind_prompt)
    ends = starts[1:][requests]  # one behind the last row of each row's request
    # The replayed rows are the last ones of their request: count down from its end.
    countdown = torch.cat([torch.arange(int(n), 0, -1) for n in n_behind_prompt])
    device = step.seq_lens.device
    requests, countdown = requests.to(device), countdown.to(device)
    return ReplayedRows(
        rows=ends.to(device).long() - countdown,
        block_table=step.block_table_tensor[requests],
        seq_lens=(step.seq_lens[requests] - countdown + 1).to(torch.int32),
    )


def _tokens_behind_prompt(step: CommonAttentionMetadata) -> torch.Tensor:
    """int [B], on the CPU: how many tokens of each request's context are not its prompt."""
    seq_lens = _seq_lens_on_cpu(step)
    if prompt_lengths is not None:
        known: torch.Tensor = seq_lens - prompt_lengths(step).to(seq_lens.dtype)
        return known
    if step.is_prefilling is None:
        return torch.zeros_like(seq_lens)
    return torch.where(step.is_prefilling, 0, seq_lens)


def _seq_lens_on_cpu(step: CommonAttentionMetadata) -> torch.Tensor:
    known: Any = step.seq_lens_cpu_upper_bound
    return step.seq_lens.cpu() if known is None else known[: step.num_reqs]
