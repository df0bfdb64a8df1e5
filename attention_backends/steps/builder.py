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
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparq.attention_backends.selection import engine_options
from vllm_sparq.attention_backends.steps.evicting import EvictingMetadata, plan_turns, take_turns
from vllm_sparq.attention_backends.steps.rows import PagedMetadata, PrefillRows, ReplayedRows
from vllm_sparq.attention_backends.steps.staged_rows import staged_rows
from vllm_sparq.retention import Phase
from vllm_sparq.scheduler.spec import RetainedSpec, StagedSpec

prompt_lengths: Callable[[CommonAttentionMetadata], torch.Tensor] | None = None
"""Prompt length of each request of a step, int [B] on the CPU. vLLM's metadata does not carry it; our worker sets this
to ask its model runner. Without it (a worker class of the user's own) a chunk that holds the end of a prompt and output
tokens behind it is read densely as a whole, and nothing can be evicted."""

shrunk_phases: Callable[[CommonAttentionMetadata], list[Phase | None]] | None = None
"""Budgets that the scheduler has shrunk, per request of a step. Set by our worker too."""


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata | EvictingMetadata]):
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
    ) -> PagedMetadata | EvictingMetadata:
        step = common_attn_metadata
        if isinstance(self.kv_cache_spec, RetainedSpec):
            return self._take_turns(step, self.kv_cache_spec)
        n_decodes = count_decodes(step)
        prefill, replayed = None, None
        if n_decodes < step.num_reqs:
            replayed = find_replayed(step, n_decodes)
            if isinstance(self.kv_cache_spec, StagedSpec):
                starts, seq_lens = step.query_start_loc_cpu.tolist(), _seq_lens_on_cpu(step).tolist()
                table, spec = step.block_table_tensor, self.kv_cache_spec
                prefill, replayed = staged_rows(starts, seq_lens, table, n_decodes, replayed, spec, self.options)
            else:
                prefill = prefill_rows(step, n_decodes)
        return PagedMetadata(
            n_decodes=n_decodes,
            block_table=step.block_table_tensor,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            prefill=prefill,
            replayed=replayed,
        )

    def _take_turns(self, step: CommonAttentionMetadata, spec: RetainedSpec) -> EvictingMetadata:
        """Where tokens are evicted, what a row sees depends on the rows before it: they take turns."""
        if prompt_lengths is None:
            raise RuntimeError("tokens cannot be evicted under this worker class: leave --worker-cls out")
        prompt_lens = prompt_lengths(step)[: step.num_reqs].tolist()
        phases: list[Phase | None] = [None] * step.num_reqs
        if shrunk_phases is not None:
            phases = shrunk_phases(step)
        starts, seq_lens = step.query_start_loc_cpu.tolist(), _seq_lens_on_cpu(step).tolist()
        turns = plan_turns(starts, seq_lens, prompt_lens, phases, spec.retention)
        return take_turns(turns, step.block_table_tensor, spec, self.options)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """A step that may evict has no fixed shape; its attention runs between the graphs of the other layers."""
        if isinstance(kv_cache_spec, RetainedSpec):
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support


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
