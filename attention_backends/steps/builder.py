"""Which rows of a step are read how; worked out once per step and cache group, shared by all its layers.

Three kinds of rows:

* *decodes*: requests with one new token after their prompt, or with as many as speculative decoding lets them verify.
  They come first (the runner sorts the batch) and are read by the read policy, each row at its own length. Over
  quantized pages the rows of a request must lie in one page, and none but a single one may fill it: so all of them find
  its tokens where they are staged. The scheduler drafts no further (`vllm_sparq.scheduler.drafting`).
* *prefill rows*: tokens of a prompt, in chunks. Always dense, however short the chunk, so that what a request answers
  does not depend on how its prompt was cut.
* *replayed rows*: other tokens after the prompt that come several in one step, such as output tokens that are computed
  again after a preemption. Each is read by the read policy at its own context length, which is what
  happened (or would have happened) when it was decoded alone; so a preempted request goes on with the K and V it had.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.steps.arrivals import Arrivals, Phases, arrivals, on_device
from vllm_sparq.attention_backends.steps.drafts import DraftTables, drafted_rows
from vllm_sparq.attention_backends.steps.evicting import EvictingMetadata, answer_turn, plan_turns, take_turns
from vllm_sparq.attention_backends.steps.policies import by_policy
from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.attention_backends.steps.rows import PagedMetadata, PrefillRows, ReplayedRows
from vllm_sparq.attention_backends.steps.staged_rows import staged_rows
from vllm_sparq.ops.dispatch import choose
from vllm_sparq.scheduler.spec import RetainedSpec, StagedSpec


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata | EvictingMetadata]):
    """Sorts the rows of a step."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        engine = PagedEngine.of(vllm_config)
        assert engine is not None
        self.options = engine.options
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=not self.options.lossless)
        n_requests = most_requests(vllm_config)
        self.drafts = DraftTables(n_requests * self.most_rows, device)
        self.requests = requests_of(vllm_config, layer_names)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.phases = Phases(device)
        layers = vllm_config.compilation_config.static_forward_context
        self.restored_pages = layers[layer_names[0]].impl.prompts.room // kv_cache_spec.block_size
        # Where a captured graph looks for the lengths of the step that replays it.
        self.arrivals = torch.zeros(len(Arrivals._fields), n_requests, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedMetadata | EvictingMetadata:
        step = self.requests.named(common_attn_metadata)
        if isinstance(self.kv_cache_spec, RetainedSpec):
            return self._take_turns(step, self.kv_cache_spec)
        n_decoding = count_decodes(step, self.most_rows, self.page_tokens)
        prefill, replayed, drafts = None, None, None
        if n_decoding < step.num_reqs:
            if not self.options.lossless:  # verified drafts are rows like those of a prompt
                replayed = find_replayed(step, n_decoding, self.requests.prompt_lens(step))
            if isinstance(self.kv_cache_spec, StagedSpec):
                starts, seq_lens = step.query_start_loc_cpu.tolist(), _seq_lens_on_cpu(step).tolist()
                table, how = step.block_table_tensor, (self.kv_cache_spec, self.options, self.restored_pages)
                prefill, replayed = staged_rows(starts, seq_lens, table, n_decoding, replayed, *how)
            else:
                prefill = prefill_rows(step, n_decoding)
        n_rows = n_decoding
        if self.most_rows > 1 and step.max_query_len > 1:
            n_rows, drafts = self.drafts.of(step, n_decoding)
        built = PagedMetadata(
            n_decodes=n_rows,
            block_table=step.block_table_tensor,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            prefill=prefill,
            replayed=replayed,
            drafts=drafts,
            dense=self.options.lossless,
        )
        return self._as_chosen(built, step, n_decoding) if self.requests.policies else built

    def _as_chosen(self, built: PagedMetadata, step: CommonAttentionMetadata, n_decoding: int) -> PagedMetadata:
        """The same step where requests have chosen what is read, its first ``n_decoding`` of one row or more each."""
        policies, replayed, decodes = self.requests.policies_of(step), built.replayed, built.decodes
        if replayed is not None:
            of_rows = [policies[owner] for owner in replayed.owners]
            replayed = replace(replayed, by_policy=by_policy(of_rows, replayed.block_table, replayed.seq_lens))
        owners = list(range(n_decoding))
        if built.drafts is not None:
            n_rows = (step.query_start_loc_cpu[1:] - step.query_start_loc_cpu[:-1])[:n_decoding]
            owners = torch.repeat_interleave(torch.arange(n_decoding), n_rows).tolist()
        chosen = by_policy([policies[owner] for owner in owners], decodes.block_table, decodes.seq_lens)
        return replace(built, replayed=replayed, by_policy=chosen)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> PagedMetadata | EvictingMetadata:
        """A step of a drafting head: first the tokens that have just been verified, then its own, one by one."""
        if draft_index == 0:
            return self.build(0, common_attn_metadata, fast_build=True)
        return drafted_rows(common_attn_metadata, draft_index, self.page_tokens)

    def build_drafts(self, common_attn_metadata: CommonAttentionMetadata) -> PagedMetadata:
        """A step that drafts: one token of each request, read by the policy."""
        step = common_attn_metadata
        return PagedMetadata(
            n_decodes=step.num_reqs,
            block_table=step.block_table_tensor,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
        )

    @property
    def page_tokens(self) -> int | None:
        """Tokens of a quantized page; None where blocks are not quantized."""
        return self.kv_cache_spec.page_tokens if isinstance(self.kv_cache_spec, StagedSpec) else None

    @property
    def most_rows(self) -> int:
        """Tokens after its prompt that a request may bring and still be a decode."""
        return self.reorder_batch_threshold or 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps of decodes, with drafts where they are decodes too; none by the reference, which asks for lengths."""
        if choose("write", vllm_config.device_config.device_type).implementation == "reference":
            return AttentionCGSupport.NEVER
        if not isinstance(kv_cache_spec, StagedSpec):
            return cls._cudagraph_support
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def _take_turns(self, step: CommonAttentionMetadata, spec: RetainedSpec) -> EvictingMetadata:
        """Where tokens are evicted, what a row sees depends on the rows before it: they take turns.

        Raises:
            RuntimeError: vLLM does not say which requests the step brings.
        """
        phases = self.requests.shrunk(step)
        if count_decodes(step) == step.num_reqs:
            prompt_lens = self.requests.prompt_lens_on(step, self.device)
            shrunk = self.phases.on_device(phases)
            found = arrivals(step.seq_lens[: step.num_reqs], prompt_lens, spec.retention, shrunk)
            kept = self.arrivals[:, : step.num_reqs]
            torch.stack(found, out=kept)
            return answer_turn(Arrivals(*kept), step, spec, self.max_model_len, self.requests.policies_of(step))
        starts, seq_lens = step.query_start_loc_cpu.tolist(), _seq_lens_on_cpu(step).tolist()
        prompt_lens = self.requests.prompt_lens_of(step)
        turns = plan_turns(starts, seq_lens, prompt_lens.tolist(), phases, spec.retention)
        how = spec, self.options, self.requests.policies_of(step), self.restored_pages
        return take_turns(turns, step.block_table_tensor, *how)


def most_requests(vllm_config: VllmConfig) -> int:
    """Requests of a step, with the padding of the largest graph."""
    padded = vllm_config.compilation_config.max_cudagraph_capture_size
    return max(vllm_config.scheduler_config.max_num_seqs, padded or 0)


def requests_of(vllm_config: VllmConfig, layer_names: list[str]) -> StepRequests:
    """What the worker has handed to these layers.

    Raises:
        RuntimeError: nothing, since the worker is not ours; refused at start-up already.
    """
    layers = vllm_config.compilation_config.static_forward_context
    impl: Any = layers[layer_names[0]].impl
    if impl.requests is None:
        raise RuntimeError("the worker class is not one of vllm-sparq's: leave --worker-cls out")
    requests: StepRequests = impl.requests
    return requests


def count_decodes(step: CommonAttentionMetadata, most_rows: int = 1, page_tokens: int | None = None) -> int:
    """Leading requests that bring at most so many tokens, all of them after their prompt; padding brings none.

    Where vLLM does not say who is in its prompt, those that bring one. ``page_tokens``: of a quantized page, which
    several tokens of a request must share and may not fill.
    """
    if step.max_query_len > 1 or _any_prefilling(step):
        query_lens = step.query_start_loc_cpu[1:] - step.query_start_loc_cpu[:-1]
        is_decode = query_lens <= (1 if step.is_prefilling is None else most_rows)
        if page_tokens is not None:
            last = _seq_lens_on_cpu(step) - 1
            staged = last % page_tokens >= query_lens - 1
            is_decode &= (query_lens <= 1) | (staged & (last % page_tokens != page_tokens - 1))
        if step.is_prefilling is not None:  # of the step's requests alone, where the others are padding
            is_decode[: len(step.is_prefilling)] &= ~step.is_prefilling
        others = (~is_decode).nonzero()
        return int(others[0]) if len(others) else step.num_reqs
    return step.num_reqs


def prefill_rows(step: CommonAttentionMetadata, n_decodes: int) -> PrefillRows:
    """Everything after the decodes."""
    starts = step.query_start_loc[n_decodes:]
    return PrefillRows(
        block_table=step.block_table_tensor[n_decodes:],
        query_start_loc=starts,
        context_lens=step.seq_lens[n_decodes:] - (starts[1:] - starts[:-1]),
        seq_lens=step.seq_lens[n_decodes:],
        max_query_len=step.max_query_len,
        max_seq_len=int(_seq_lens_on_cpu(step).max()),
    )


def _any_prefilling(step: CommonAttentionMetadata) -> bool:
    return step.is_prefilling is not None and bool(step.is_prefilling.any())


def find_replayed(
    step: CommonAttentionMetadata, n_decodes: int, prompt_lens: torch.Tensor | None
) -> ReplayedRows | None:
    """The rows after the decodes whose position is after their request's prompt.

    None where prompt lengths are unknown: a drafting model, which alone has such steps, gets its whole prompt in one of
    them, without a word that it is one.
    """
    if prompt_lens is None:
        return None
    starts, seq_lens = step.query_start_loc_cpu, _seq_lens_on_cpu(step)
    query_lens = (starts[1:] - starts[:-1])[n_decodes:]
    n_after_prompt = (seq_lens - prompt_lens.to(seq_lens.dtype))[n_decodes:].clamp(min=0).minimum(query_lens)
    n_rows = int(n_after_prompt.sum())
    if n_rows == 0:
        return None
    requests = torch.repeat_interleave(torch.arange(n_decodes, step.num_reqs), n_after_prompt)
    ends = starts[1:][requests]  # one after the last row of each row's request
    # The replayed rows are the last ones of their request: count down from its end.
    countdown = torch.cat([torch.arange(int(n), 0, -1) for n in n_after_prompt])
    rows, device = ends.long() - countdown, step.seq_lens.device
    owners = requests.tolist()
    requests, countdown, there = (on_device(x, torch.int64, device) for x in (requests, countdown, rows))
    return ReplayedRows(
        rows=there,
        rows_on_host=rows.tolist(),
        owners=owners,
        block_table=step.block_table_tensor[requests],
        seq_lens=(step.seq_lens[requests] - countdown + 1).to(torch.int32),
    )


def _seq_lens_on_cpu(step: CommonAttentionMetadata) -> torch.Tensor:
    known: Any = step.seq_lens_cpu_upper_bound
    return step.seq_lens.cpu() if known is None else known[: step.num_reqs]
