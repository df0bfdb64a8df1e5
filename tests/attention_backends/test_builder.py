"""Which rows of a step are decodes, prefill rows and replayed rows; by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparq.attention_backends.steps.builder import PagedMetadataBuilder, count_decodes
from vllm_sparq.attention_backends.steps.drafts import DraftTables
from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.attention_backends.steps.rows import PagedMetadata
from vllm_sparq.config import Options
from vllm_sparq.retention import Phase


def step(*requests: tuple[int, int, int]) -> Any:
    """A step of (new tokens, context length, prompt length) requests, as vLLM's V1 runner describes it."""
    query_lens, seq_lens, prompt_lens = (
        torch.tensor(column, dtype=torch.int32) for column in zip(*requests, strict=True)
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), query_lens.cumsum(0, dtype=torch.int32)])
    return SimpleNamespace(
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(query_lens.max()),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        is_prefilling=seq_lens - query_lens < prompt_lens,
        block_table_tensor=torch.arange(len(requests), dtype=torch.int32)[:, None] * 100
        + torch.arange(4, dtype=torch.int32),
        prompt_lens=prompt_lens,
    )


class Known:
    """Stands for `StepRequests`: prompt lengths as the step of a test brings them, and what requests have chosen."""

    policies: dict[str, Options]

    def __init__(self, **policies: Options) -> None:
        self.policies = policies

    def policies_of(self, step: Any) -> list[Options | None]:
        return [self.policies.get(f"r{i}") for i in range(step.num_reqs)]

    def named(self, step: Any) -> Any:
        return step

    def prompt_lens(self, step: Any) -> torch.Tensor | None:
        lens: torch.Tensor | None = step.prompt_lens
        return lens


def build(common: Any, most_rows: int = 1, **policies: Options) -> PagedMetadata:
    return build_for(Known(**policies), common, most_rows)


def build_for(requests: Any, common: Any, most_rows: int = 1) -> PagedMetadata:
    """The step as a builder sorts it that asks these about its requests."""
    builder: Any = object.__new__(PagedMetadataBuilder)
    builder.options, builder.requests, builder.reorder_batch_threshold = Options(), requests, most_rows
    builder.drafts = DraftTables(8 * most_rows, torch.device("cpu"))
    builder.kv_cache_spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
    built: PagedMetadata = builder.build(0, common)
    return built


def test_all_decodes() -> None:
    result = build(step((1, 50, 40), (1, 41, 40)))
    assert (result.n_decodes, result.prefill, result.replayed) == (2, None, None)


def test_one_token_of_a_prompt_is_prefill() -> None:
    """The tail of a prompt may be one token long: how the prompt was cut must not show."""
    result = build(step((1, 41, 40), (1, 40, 40)))
    assert result.n_decodes == 1
    assert result.prefill is not None
    assert result.prefill.query_start_loc.tolist() == [1, 2]
    assert result.prefill.context_lens.tolist() == [39]
    assert result.replayed is None


def test_mixed_step() -> None:
    result = build(step((1, 9, 8), (3, 10, 20), (5, 5, 5)))
    assert result.n_decodes == 1
    assert result.prefill is not None
    assert result.prefill.query_start_loc.tolist() == [1, 4, 9]
    assert result.prefill.context_lens.tolist() == [7, 0]
    assert result.prefill.block_table[:, 0].tolist() == [100, 200]
    assert result.replayed is None


def test_output_tokens_are_replayed_at_their_own_length() -> None:
    """A preempted request comes back with 4 prompt tokens and 3 output tokens: rows 4 to 6 of it are replayed."""
    result = build(step((1, 9, 8), (7, 7, 4), (2, 12, 12)))
    assert result.replayed is not None
    assert result.replayed.rows.tolist() == [5, 6, 7]  # row 0 is the decode
    assert result.replayed.seq_lens.tolist() == [5, 6, 7]
    assert result.replayed.block_table[:, 0].tolist() == [100, 100, 100]


def test_a_chunk_after_the_prompt_is_replayed_whole() -> None:
    result = build(step((3, 13, 4), (2, 6, 5)))
    assert result.n_decodes == 0
    assert result.replayed is not None
    assert result.replayed.rows.tolist() == [0, 1, 2, 4]
    assert result.replayed.seq_lens.tolist() == [11, 12, 13, 6]
    assert result.replayed.block_table[:, 0].tolist() == [0, 0, 0, 100]


def test_without_prompt_lengths_nothing_is_replayed() -> None:
    """The prompt of a drafting model, beside drafts to catch up with, as model runner V2 describes them."""
    unnamed = step((2049, 2049, 2049), (4, 900, 890))
    unnamed.prompt_lens, unnamed.is_prefilling = None, torch.zeros(2, dtype=torch.bool)
    result = build(unnamed, most_rows=4)
    assert result.replayed is None
    assert result.prefill is not None
    assert result.prefill.query_start_loc.tolist() == [0, 2049, 2053]


def test_padding_requests_count_as_decodes() -> None:
    result = build(step((1, 9, 8), (0, 0, 0)))
    assert (result.n_decodes, result.prefill) == (2, None)


def table_of_requests(lens: list[int]) -> Any:
    """Model runner V2: requests keep their row in a table."""
    names = {row: f"request {row}" for row in range(len(lens))}
    lengths = SimpleNamespace(np=np.array(lens, dtype=np.int32))
    return SimpleNamespace(req_states=SimpleNamespace(prompt_len=lengths, index_to_req_id=names))


def test_requests_of_a_step_are_found_by_their_rows() -> None:
    """vLLM names rows as a numpy array, fewer than the step has requests where a batch is padded."""
    requests = StepRequests(table_of_requests([10, 20, 30]))
    phase = Phase(start=20, held=20, budget=16)
    requests.phases = {"request 1": phase}
    full = SimpleNamespace(num_reqs=2, req_idx=np.array([2, 1]))
    assert requests.prompt_lens(full).tolist() == [30, 20]  # type: ignore[union-attr]
    assert requests.shrunk(full) == [None, phase]
    padded = SimpleNamespace(num_reqs=4, req_idx=np.array([1, 0]))
    assert requests.prompt_lens(padded).tolist() == [20, 10, 0, 0]  # type: ignore[union-attr]
    assert requests.shrunk(padded) == [phase, None, None, None]


def test_steps_of_drafting_models_name_no_requests() -> None:
    requests = StepRequests(table_of_requests([10, 20]))
    requests.phases = {"request 1": Phase(start=20, held=20, budget=16)}
    unnamed = SimpleNamespace(num_reqs=2, req_idx=None)
    assert requests.prompt_lens(unnamed) is None
    assert requests.shrunk(unnamed) == [None, None]


def test_requests_of_model_runner_v1_stand_in_its_batch() -> None:
    batch = SimpleNamespace(num_prompt_tokens_cpu_tensor=torch.tensor([5, 6, 7]), req_ids=["a", "b"])
    requests = StepRequests(SimpleNamespace(input_batch=batch))
    phase = Phase(start=6, held=6, budget=4)
    requests.phases = {"b": phase}
    two = SimpleNamespace(num_reqs=2)
    assert requests.prompt_lens(two).tolist() == [5, 6]  # type: ignore[union-attr]
    assert requests.shrunk(two) == [None, phase]


def test_drafts_are_decodes_at_their_own_lengths() -> None:
    """Requests that verify two, one and no draft; then a prompt, and an answer computed again."""
    result = build(step((3, 50, 40), (2, 30, 20), (1, 41, 40), (5, 5, 9), (6, 30, 10)), most_rows=4)
    assert result.n_decodes == 6
    assert result.drafts is not None
    assert result.drafts.seq_lens.tolist() == [48, 49, 50, 29, 30, 41]
    assert result.drafts.block_table[:, 0].tolist() == [0, 0, 0, 100, 100, 200]
    assert result.block_table.shape[0] == 5
    assert result.prefill is not None
    assert result.prefill.query_start_loc.tolist() == [6, 11, 17]
    assert result.replayed is not None
    assert result.replayed.rows.tolist() == [11, 12, 13, 14, 15, 16]


def test_padded_drafts_see_nothing() -> None:
    """A graph for three requests of two rows that holds two."""
    common = step((2, 50, 40), (2, 30, 20), (0, 0, 0))
    common.num_actual_tokens, common.is_prefilling = 6, torch.tensor([False, False])
    first = build(common, most_rows=2)
    assert first.n_decodes == 6
    assert first.drafts is not None
    assert first.drafts.seq_lens.tolist() == [49, 50, 29, 30, 0, 0]


def test_drafts_whose_prompts_are_unknown_are_not_read_sparsely() -> None:
    """vLLM says nothing of prompts to the metadata of a drafting model."""
    common = step((3, 50, 40), (3, 60, 40))
    common.is_prefilling = common.prompt_lens = None
    result = build(common, most_rows=4)
    assert (result.n_decodes, result.replayed) == (0, None)


def test_over_codes_rows_of_a_decode_share_a_page_that_they_do_not_fill() -> None:
    """Pages of 16: drafts at 45 to 46; one token that fills a page; then drafts that fill one, which are no decodes."""
    common = step((2, 47, 40), (1, 48, 40), (3, 48, 40), (2, 49, 40))
    assert count_decodes(common, 4) == 4
    assert count_decodes(common, 4, page_tokens=16) == 2
    beyond = step((2, 49, 40), (1, 48, 40))
    assert count_decodes(beyond, 4, page_tokens=16) == 0
    assert count_decodes(step((3, 51, 40), (1, 17, 9)), 4, page_tokens=16) == 2


CHOICE, OTHER = Options(k=8), Options(read="dense")


def test_decodes_are_sorted_by_what_their_requests_chose() -> None:
    result = build(step((1, 50, 40), (1, 41, 40), (1, 60, 40), (4, 4, 9)), r1=CHOICE, r2=OTHER, r3=OTHER)
    own, chosen, other = result.by_policy
    assert [group.options for group in result.by_policy] == [None, CHOICE, OTHER]
    assert [group.rows.tolist() for group in result.by_policy if group.rows is not None] == [[0], [1], [2]]
    assert (own.seq_lens.tolist(), chosen.seq_lens.tolist(), other.seq_lens.tolist()) == ([50], [41], [60])
    assert other.block_table[:, 0].tolist() == [200]


def test_one_choice_of_all_takes_no_copies() -> None:
    (group,) = build(step((1, 50, 40), (1, 41, 40)), r0=CHOICE, r1=CHOICE).by_policy
    assert (group.options, group.rows) == (CHOICE, None)


def test_a_choice_of_a_request_in_its_prompt_sorts_nothing() -> None:
    assert build(step((1, 50, 40), (4, 4, 9)), r1=CHOICE).by_policy == ()


def test_drafts_and_replayed_rows_follow_their_requests() -> None:
    result = build(step((3, 50, 40), (1, 41, 40), (6, 30, 10), (7, 13, 9)), most_rows=4, r1=CHOICE, r2=CHOICE)
    own, chosen = result.by_policy
    assert own.rows is not None
    assert chosen.rows is not None
    assert (own.rows.tolist(), own.seq_lens.tolist()) == ([0, 1, 2], [48, 49, 50])
    assert (chosen.rows.tolist(), chosen.seq_lens.tolist()) == ([3], [41])
    assert result.replayed is not None
    again, first = result.replayed.by_policy
    assert (again.options, first.options) == (CHOICE, None)
    assert again.seq_lens.tolist() == [25, 26, 27, 28, 29, 30]
    assert first.seq_lens.tolist() == [10, 11, 12, 13]
    assert first.rows is not None
    assert result.replayed.rows[first.rows].tolist() == [13, 14, 15, 16]


def test_choices_come_and_go_with_their_requests() -> None:
    requests = StepRequests(SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"])))

    def follow(finished: set[str], **new: Options | None) -> list[Options | None]:
        joined = [SimpleNamespace(req_id=name, sampling_params=options) for name, options in new.items()]
        output = SimpleNamespace(finished_req_ids=finished, scheduled_new_reqs=joined)
        requests.follow(output, lambda params: params)
        return requests.policies_of(SimpleNamespace(num_reqs=3))

    assert follow(set(), a=None, b=None) == [None, None, None]
    assert follow(set(), a=CHOICE) == [None, CHOICE, None]
    assert follow({"a"}, b=OTHER) == [OTHER, None, None]
    assert follow({"b"}, b=CHOICE) == [CHOICE, None, None]  # another of the same name
    assert follow(set(), b=None) == [None, None, None]  # a session that goes on without
    assert requests.policies == {}
