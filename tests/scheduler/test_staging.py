"""Staging over vLLM's own block pool: whatever happens to requests, each finds the tokens that it wrote."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_sparq.attention_backends.backend import PagedBackend
from vllm_sparq.attention_backends.capacity import planning
from vllm_sparq.attention_backends.steps.drafts import drafted_rows
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.codec import decode_page, encode_page
from vllm_sparq.ops.dense_decode.reference import cached_tokens
from vllm_sparq.ops.write.reference import write
from vllm_sparq.scheduler.drafting import most_drafts
from vllm_sparq.scheduler.manager import StagingManager, register_specs
from vllm_sparq.scheduler.spec import PagedSpec, StagedSpec, page_spec

N_BLOCKS = 24
MAX_LEN = 160
LAYOUT = PageLayout(head_size=16, block_size=16, dtype=torch.float32, format="int4", value_sum=True)
KV: dict[str, Any] = dict(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
PLAIN = FullAttentionSpec(**KV)


def new_manager(n_blocks: int = N_BLOCKS, block_size: int = 16) -> KVCacheManager:
    spec = page_spec(replace(PLAIN, block_size=block_size), LAYOUT)
    config = KVCacheConfig(n_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    sizes = dict(scheduler_block_size=block_size, hash_block_size=block_size)
    return KVCacheManager(config, MAX_LEN, **sizes, enable_caching=True)


def pages_of(blocks: list[int], pages_per_block: int) -> list[int]:
    """The pages that lie side by side in these blocks, as vLLM's workers number them."""
    return [block * pages_per_block + page for block in blocks for page in range(pages_per_block)]


def content(tokens: list[int]) -> torch.Tensor:
    """K and V [S, 2, 16] of a request: of each token and of its position."""
    ids = torch.tensor(tokens)[:, None, None]
    position = torch.arange(len(tokens))[:, None, None]
    return torch.sin(0.1 * (1 + ids * 7 + position * 13) * (1 + torch.arange(32).view(1, 2, 16)))


def as_read(kv: torch.Tensor) -> torch.Tensor:
    """What a decode step should see of K and V [S, 2, D]: full blocks but the newest as their codes say."""
    seen, n = kv.clone(), LAYOUT.block_size
    for first in range(0, (len(kv) - 1) // n * n, n):
        pages = Pages.empty(1, 1, LAYOUT)
        encode_page(pages, 0, 0, kv[first : first + n, 0], kv[first : first + n, 1])
        seen[first : first + n] = torch.stack(decode_page(pages, 0, 0), 1)
    return seen


class Staging(RuleBasedStateMachine):
    """Requests that share prefixes come, grow in chunks, are preempted, come back and go, on too small a pool."""

    n_blocks, pages_per_block = N_BLOCKS, 1

    def __init__(self) -> None:
        super().__init__()
        init_none_hash(sha256)
        self.block_size = 16 * self.pages_per_block
        self.manager = new_manager(self.n_blocks, self.block_size)
        n_pages = self.n_blocks * self.pages_per_block
        self.pages = Pages(torch.full((n_pages, 1, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8), LAYOUT)
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.rows: dict[str, list[int]] = {}  # the worker's block table: it is appended to and nothing else
        self.n_made = 0

    def rest(self, request: Request) -> int:
        return request.num_tokens - request.num_computed_tokens

    @rule(shared=st.integers(0, 3), length=st.integers(1, 70))
    def arrive(self, shared: int, length: int) -> None:
        """A prompt from one of four families, so that prefixes meet."""
        self.n_made += 1
        prompt = [shared + i % 5 for i in range(length)]
        hasher = get_request_block_hasher(self.block_size, sha256)
        sampling = SamplingParams(max_tokens=MAX_LEN - length, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        self.waiting.append(Request(f"r{self.n_made}", prompt, sampling, None, block_hasher=hasher))

    @precondition(lambda self: self.waiting)
    @rule(chunk=st.integers(1, 50))
    def admit(self, chunk: int) -> None:
        request = self.waiting[0]
        hit, n_hit, _ = self.manager.get_computed_blocks(request)
        n_new = min(chunk, request.num_tokens - n_hit)
        if self.manager.allocate_slots(request, n_new, n_hit, hit) is None:
            return
        assert n_hit % self.block_size == 0
        self.waiting.pop(0)
        self.running.append(request)
        self.rows[request.request_id] = list(self.manager.get_block_ids(request.request_id)[0])
        request.num_computed_tokens = n_hit
        self.compute(request, n_new)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), chunk=st.integers(1, 50), token=st.integers(0, 9))
    def grow(self, which: int, chunk: int, token: int) -> None:
        """The next chunk of the prompt, or one more output token."""
        request = self.running[which % len(self.running)]
        if self.rest(request) == 0:
            if request.num_tokens >= MAX_LEN:
                return
            request.append_output_token_ids(token)
        n_new = min(chunk, self.rest(request))
        blocks = self.manager.allocate_slots(request, n_new)
        if blocks is None:
            self.preempt(which=-1)
            return
        self.rows[request.request_id] += blocks.get_block_ids()[0]
        self.compute(request, n_new)

    @precondition(lambda self: self.running)
    @rule(
        which=st.integers(0, 99),
        n_drafts=st.integers(1, 20),
        n_right=st.integers(0, 20),
        n_next=st.integers(0, 20),
        token=st.integers(0, 9),
    )
    def verify(self, which: int, n_drafts: int, n_right: int, n_next: int, token: int) -> None:
        """An output token, and drafts of which the first ones turn out right; the others leave K and V behind.

        As a drafting head does in layers of its own that has made ``n_next`` of them, kept or not.
        """
        request = self.running[which % len(self.running)]
        if self.rest(request) or request.num_tokens + n_drafts >= MAX_LEN:
            return
        request.append_output_token_ids(token)
        drafts = [50 + i for i in range(min(n_drafts, most_drafts(request.num_tokens, 16)))]
        blocks = self.manager.allocate_slots(request, 1 + len(drafts), num_lookahead_tokens=n_next)
        if blocks is None:
            self.preempt(which=-1)
            return
        self.rows[request.request_id] += blocks.get_block_ids()[0]
        for n in range(1, n_next + 1):
            self.draft(request, n)
        first, tokens = request.num_computed_tokens, [*request.all_token_ids, *drafts]
        self.compute(request, 1 + len(drafts), drafts)
        for n in range(first + 1, len(tokens) + 1):  # what each row sees
            self.reads(request, tokens[:n])
        request.append_output_token_ids(drafts[:n_right])
        request.num_computed_tokens = first + 1 + min(n_right, len(drafts))

    def draft(self, request: Request, n: int) -> None:
        """A drafting head writes its ``n``-th token after those that are computed; vLLM counts anew at the last."""
        stop, one = request.num_computed_tokens + n, torch.tensor([0, 1], dtype=torch.int32)
        stop -= MAX_LEN if stop > MAX_LEN else 0
        length = torch.tensor([stop], dtype=torch.int32)
        rows = drafted_rows(
            CommonAttentionMetadata(one, one, length, 1, 1, 1, stop, self.table(request), length), n, LAYOUT.block_size
        )
        new = content([99] * stop)[-1:]
        write(new[:, None, 0], new[:, None, 1], self.pages, rows.block_table, one, rows.seq_lens)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        request = self.running.pop(which % len(self.running))
        self.manager.free(request)
        del self.rows[request.request_id]
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        request = self.running.pop(which % len(self.running))
        self.manager.free(request)
        del self.rows[request.request_id]

    def compute(self, request: Request, n_new: int, drafts: Sequence[int] = ()) -> None:
        first, stop = request.num_computed_tokens, request.num_computed_tokens + n_new
        new = content([*request.all_token_ids, *drafts][:stop])[first:]
        starts, length = torch.tensor([0, n_new], dtype=torch.int32), torch.tensor([stop], dtype=torch.int32)
        write(new[:, None, 0], new[:, None, 1], self.pages, self.table(request), starts, length)
        request.num_computed_tokens = stop

    def table(self, request: Request) -> torch.Tensor:
        return torch.tensor([self.row(request)], dtype=torch.int32)

    def row(self, request: Request) -> list[int]:
        return pages_of(self.rows[request.request_id], self.pages_per_block)

    @invariant()
    def everybody_reads_what_they_wrote(self) -> None:
        for request in self.running:
            self.reads(request, list(request.all_token_ids)[: request.num_computed_tokens])

    def reads(self, request: Request, tokens: list[int]) -> None:
        """That a row which sees these tokens of a request reads what they have written."""
        found = torch.stack(cached_tokens(self.pages, self.table(request)[0], len(tokens), 0), 1)
        torch.testing.assert_close(found, as_read(content(tokens)), rtol=0, atol=0)

    @invariant()
    def staging_pages_belong_to_one_request(self) -> None:
        owners: dict[int, int] = {}
        for request in self.running:
            row = self.row(request)
            newest = (request.num_computed_tokens - 1) // 16
            assert len(row) >= newest + 1 + LAYOUT.n_staging_blocks
            for page in row[newest:]:
                owners[page] = owners.get(page, 0) + 1
        assert all(n == 1 for n in owners.values())


class StagingInLargeBlocks(Staging):
    """Blocks of three pages, as beside layers with a state."""

    n_blocks, pages_per_block = 10, 3


TestStaging = pytest.mark.slow(Staging.TestCase)
TestStaging.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestStagingInLargeBlocks = pytest.mark.slow(StagingInLargeBlocks.TestCase)
TestStagingInLargeBlocks.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("page_tokens", [16, 32])
def test_drafts_stay_in_their_page_and_do_not_fill_it(page_tokens: int) -> None:
    for n_tokens in range(1, 4 * page_tokens):
        positions = range(n_tokens - 1, n_tokens + most_drafts(n_tokens, page_tokens))
        assert {position // page_tokens for position in positions} == {(n_tokens - 1) // page_tokens}
        assert all(position % page_tokens != page_tokens - 1 for position in positions[1:])
        further = positions[-1] + 1
        assert further % page_tokens in (0, page_tokens - 1)


def test_spec_counts_the_staging_blocks() -> None:
    spec: Any = page_spec(PLAIN, LAYOUT)
    assert isinstance(spec, StagedSpec)
    # A page: 16 tokens of 2 x 8 bytes of codes and 2 x 8 bytes of scales, and 64 bytes of the sum of V: 576. A token in
    # full is 2 x 16 x 4 = 128 bytes: 4 fit into a page, so 16 need 4 pages.
    assert (spec.page_size_bytes, spec.staged_per_page, spec.n_staging_pages) == (576, 4, 4)

    class Model:
        max_model_len = 100

    class Parallel:
        decode_context_parallel_size = 1

    class Config:
        model_config, parallel_config = Model, Parallel

    assert spec.max_memory_usage_bytes(Config) == (7 + 4) * 576
    assert spec.max_num_blocks_per_req(Config, 100) == 7 + 4


def test_a_block_of_several_pages() -> None:
    """At 100 tokens: 7 pages and 4 ahead are 3 blocks of 4 pages; a page is as large as ever."""
    spec: Any = page_spec(replace(PLAIN, block_size=64), LAYOUT)
    assert (spec.page_size_bytes, spec.page_tokens, spec.n_staging_pages) == (4 * 576, 16, 4)
    assert [spec.n_blocks(n) for n in (1, 16, 100, 128, 129)] == [2, 2, 3, 3, 4]
    assert spec.copy_with_new_block_size(16) == page_spec(PLAIN, LAYOUT)
    assert PagedBackend.get_supported_kernel_block_sizes(spec) == [16]
    plain = page_spec(replace(PLAIN, block_size=64), PageLayout(head_size=16, block_size=16, dtype=torch.float32))
    assert type(plain) is PagedSpec
    assert type(plain).merge([plain, plain]) == plain
    assert PagedBackend.get_supported_kernel_block_sizes(plain) == [16]
    assert KVCacheSpecRegistry.get_manager_class(plain) is FullAttentionManager
    one_token = page_spec(replace(PLAIN, block_size=1), LAYOUT)  # vLLM's question before it chooses a block size
    assert one_token.page_size_bytes * 16 == 576


def test_merged_specs_keep_their_fields() -> None:
    spec = page_spec(PLAIN, LAYOUT)
    merged = type(spec).merge([spec, spec])
    assert merged == spec
    assert {f.name for f in fields(merged)} == {f.name for f in fields(StagedSpec)}
    other = page_spec(
        PLAIN, PageLayout(head_size=16, block_size=16, dtype=torch.float32, format="int8", value_sum=True)
    )
    for unlike in (other, SlidingWindowSpec(**KV, sliding_window=32), PLAIN):
        with pytest.raises(AssertionError, match="must"):  # which is how vLLM asks whether layers are alike
            type(spec).merge([spec, unlike])
    assert not planning().is_kv_cache_spec_uniform({"0": spec, "1": SlidingWindowSpec(**KV, sliding_window=32)})


def test_model_format_needs_no_staging() -> None:
    layout = PageLayout(head_size=16, block_size=16, dtype=torch.float32)
    assert type(page_spec(PLAIN, layout)) is FullAttentionSpec


@pytest.mark.slow
def test_a_process_that_gets_a_spec_knows_its_manager() -> None:
    """As vLLM's engine core gets it from a worker: pickled, nothing of ours imported before."""
    code = (
        "import pickle; from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as registry;"
        f"print(registry.get_manager_class(pickle.loads({pickle.dumps(page_spec(PLAIN, LAYOUT))!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["StagingManager"]


def test_registry_knows_ours_and_vllms() -> None:
    assert KVCacheSpecRegistry.get_manager_class(page_spec(PLAIN, LAYOUT)) is StagingManager
    assert KVCacheSpecRegistry.get_manager_class(PLAIN) is not None
    assert KVCacheSpecRegistry.get_manager_class(PLAIN) is not StagingManager
    register_specs()
