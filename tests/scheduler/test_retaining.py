"""Eviction over vLLM's own block pool: each request keeps what it should, and blocks come back."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from tests.scheduler.test_staging import pages_of
from vllm_sparq import retention as retention_module
from vllm_sparq.attention_backends.steps.evicting import plan_turns
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.dense_decode.reference import cached_tokens
from vllm_sparq.ops.evict.reference import evict
from vllm_sparq.ops.write.reference import write
from vllm_sparq.retention import PHASES, Retention
from vllm_sparq.scheduler.manager import knowing_prompts
from vllm_sparq.scheduler.scheduler import EvictingMixin
from vllm_sparq.scheduler.spec import page_spec

N, N_BLOCKS, MAX_LEN = 16, 26, 200
PLAIN = FullAttentionSpec(block_size=N, num_kv_heads=1, head_size=16, dtype=torch.float32)


def layout_of(fmt: str, *, attention: bool) -> PageLayout:
    return PageLayout(head_size=16, block_size=N, dtype=torch.float32, format=fmt, positions=True, attention=attention)


def new_manager(spec: FullAttentionSpec, n_blocks: int = N_BLOCKS) -> KVCacheManager:
    config = KVCacheConfig(n_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    sizes = dict(scheduler_block_size=spec.block_size, hash_block_size=spec.block_size)
    return KVCacheManager(config, MAX_LEN, **sizes, enable_caching=False)


def content(tokens: list[int], positions: torch.Tensor) -> torch.Tensor:
    """K [n, 16] of a request's tokens at some positions; V is the same, negated."""
    ids = torch.tensor(tokens)[positions][:, None]
    return torch.sin(0.1 * (1 + ids * 7 + positions[:, None] * 13) * (1 + torch.arange(16)))


def attention(positions: torch.Tensor) -> torch.Tensor:
    """The score that a token at a position gets, once; some are equal."""
    return (positions * 37 % 29).float()


class Loop:
    """vLLM's scheduling loop in small: running requests first, the last one is preempted, then who waits."""

    def __init__(self, manager: KVCacheManager) -> None:
        knowing_prompts(manager)
        self.kv_cache_manager = manager
        self.counts: dict[str, int] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.n_preempted = 0

    def schedule(self, chunk: int) -> Any:
        output = SimpleNamespace(num_scheduled_tokens={}, new_blocks={})
        i = 0
        while i < len(self.running):
            request = self.running[i]
            n_new = min(chunk, request.num_tokens - request.num_computed_tokens)
            blocks = None
            while n_new and (blocks := self.kv_cache_manager.allocate_slots(request, n_new)) is None:
                victim = self.running.pop()
                self.preempt(victim)
                if victim is request:
                    break
            if blocks is not None:
                output.num_scheduled_tokens[request.request_id] = n_new
                output.new_blocks[request.request_id] = blocks.get_block_ids()[0]
            i += 1
        while self.waiting and not self.n_preempted:
            request = self.waiting[0]
            n_new = min(chunk, request.num_tokens)
            blocks = self.kv_cache_manager.allocate_slots(request, n_new, full_sequence_must_fit=True)
            if blocks is None:
                break
            self.running.append(self.waiting.pop(0))
            request.status = RequestStatus.RUNNING
            output.num_scheduled_tokens[request.request_id] = n_new
            output.new_blocks[request.request_id] = blocks.get_block_ids()[0]
        self.n_preempted = 0
        return output

    def count(self, **counts: int) -> None:
        self.counts |= counts

    def preempt(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        request.num_computed_tokens, request.status = 0, RequestStatus.PREEMPTED
        self.waiting.insert(0, request)
        self.n_preempted += 1


class EvictingLoop(EvictingMixin, Loop):
    pass


class Simulated:
    """One request's kept positions by the definition, token by token."""

    def __init__(self, retention: Retention, prompt_len: int, *, by_score: bool) -> None:
        self.retention, self.prompt_len, self.by_score = retention, prompt_len, by_score
        self.budget = retention.budget_of(prompt_len)
        self.kept: list[int] = []
        self.position = 0

    def take(self, n_tokens: int) -> None:
        for _ in range(n_tokens):
            t, r = self.position, self.retention
            if t < self.prompt_len:
                if r.bounded and t % r.segment == 0:
                    self.drop_to(self.budget)
            elif len(self.kept) >= self.budget:
                self.drop_to(self.budget - r.interval)
            self.kept.append(t)
            self.position += 1

    def drop_to(self, n: int) -> None:
        recent_from = self.position + 1 - self.retention.recent_of(self.budget)
        while len(self.kept) > n:
            may_go = [p for p in self.kept if self.retention.sinks <= p < recent_from]
            if self.by_score:
                self.kept.remove(min(may_go, key=lambda p: (p * 37 % 29, -p)))
            else:
                self.kept.remove(min(may_go))


class Retaining(RuleBasedStateMachine):
    """Requests come, grow in chunks, are preempted, shrunk, aborted, on a pool that is too small."""

    fmt = "model"
    n_blocks, pages_per_block = N_BLOCKS, 1
    evicting = False
    by_score = True
    retention = Retention(budget=70, recent=20, sinks=2, rank="attention", bounded=False, interval=1, block_size=N)

    def __init__(self) -> None:
        super().__init__()
        self.layout = layout_of(self.fmt, attention=self.by_score)
        spec = page_spec(replace(PLAIN, block_size=N * self.pages_per_block), self.layout, self.retention)
        manager = new_manager(spec, self.n_blocks)
        self.loop: Loop = EvictingLoop(manager) if self.evicting else Loop(manager)
        self.manager = manager
        n_pages = self.n_blocks * self.pages_per_block
        self.pages = Pages(torch.full((n_pages, 1, self.layout.page_bytes), 0xFF, dtype=torch.uint8), self.layout)
        self.rows: dict[str, list[int]] = {}  # the worker's block table: it is appended to and nothing else
        self.simulated: dict[str, Simulated] = {}
        self.n_made = 0

    @rule(length=st.integers(1, 150))
    def arrive(self, length: int) -> None:
        self.n_made += 1
        sampling = SamplingParams(max_tokens=MAX_LEN - length, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        prompt = [self.n_made + i % 5 for i in range(length)]
        self.loop.waiting.append(Request(f"r{self.n_made}", prompt, sampling, None))

    @rule(chunk=st.integers(1, 60), n_steps=st.integers(1, 12))
    def steps(self, chunk: int, n_steps: int) -> None:
        for _ in range(n_steps):
            self.step(chunk)

    def step(self, chunk: int) -> None:
        for request in self.loop.running:
            if request.num_tokens == request.num_computed_tokens and request.num_tokens < MAX_LEN:
                request.append_output_token_ids(len(request.all_token_ids) % 7)
        output = self.loop.schedule(chunk)
        by_id = {request.request_id: request for request in self.loop.running}
        scheduled = [by_id[name] for name in output.num_scheduled_tokens if name in by_id]
        phases = getattr(output, PHASES, {})
        starts, seq_lens = [0], []
        for request in scheduled:
            name, n_new = request.request_id, output.num_scheduled_tokens[request.request_id]
            if request.num_computed_tokens == 0:
                self.rows[name] = []
                self.simulated[name] = Simulated(self.retention, request.num_prompt_tokens, by_score=self.by_score)
            self.rows[name] += output.new_blocks[name]
            starts.append(starts[-1] + n_new)
            seq_lens.append(request.num_computed_tokens + n_new)
            if name in phases:
                self.simulated[name].budget = phases[name].budget
        prompt_lens = [request.num_prompt_tokens for request in scheduled]
        shrunk = [phases.get(request.request_id) for request in scheduled]
        for shares in plan_turns(starts, seq_lens, prompt_lens, shrunk, self.retention):
            for share in shares:
                self.evict(scheduled[share.request], share)
            for share in shares:
                self.write(scheduled[share.request], share)
        for request in scheduled:
            n_new = output.num_scheduled_tokens[request.request_id]
            request.num_computed_tokens += n_new
            self.simulated[request.request_id].take(n_new)

    def evict(self, request: Request, share: Any) -> None:
        lens = [
            torch.tensor([n], dtype=torch.int32) for n in (share.arrival.held, share.arrival.kept, share.recent_from)
        ]
        evict(self.pages, self.table(request), *lens, sinks=self.retention.sinks, rank=self.retention.rank)

    def write(self, request: Request, share: Any) -> None:
        positions = torch.arange(share.position, share.position + share.stop - share.start)
        new = content(list(request.all_token_ids), positions)[:, None]
        starts, length = (
            torch.tensor([0, len(new)], dtype=torch.int32),
            torch.tensor([share.seq_len], dtype=torch.int32),
        )
        first = torch.tensor([share.position], dtype=torch.int32)
        write(new, -new, self.pages, self.table(request), starts, length, first)
        if self.by_score:
            slots = torch.arange(share.arrival.kept, share.seq_len)
            page = self.table(request)[0].long()[slots // N]
            self.pages.attention[page, 0, slots % N] = attention(positions)

    def table(self, request: Request) -> torch.Tensor:
        row = pages_of(self.rows[request.request_id], self.pages_per_block)
        return torch.tensor([row], dtype=torch.int32)

    @precondition(lambda self: self.loop.running)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        self.manager.free(self.loop.running.pop(which % len(self.loop.running)))

    @precondition(lambda self: self.loop.waiting)
    @rule(which=st.integers(0, 99))
    def abort_one_that_waits(self, which: int) -> None:
        self.manager.free(self.loop.waiting.pop(which % len(self.loop.waiting)))

    @precondition(lambda self: self.loop.running)
    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        self.loop.preempt(self.loop.running.pop(which % len(self.loop.running)))
        self.loop.n_preempted = 0

    @invariant()
    def everybody_keeps_what_the_definition_keeps(self) -> None:
        for request in self.loop.running:
            simulated = self.simulated[request.request_id]
            slots, table = torch.arange(len(simulated.kept)), self.table(request)[0]
            positions = self.pages.positions[table.long()[slots // N], 0, slots % N]
            assert sorted(positions.tolist()) == sorted(simulated.kept)
            if not simulated.kept:
                continue
            expected = content(list(request.all_token_ids), positions)
            keys, values = cached_tokens(self.pages, table, len(simulated.kept), 0)
            tolerance = 0.0 if self.fmt == "model" else 0.02
            torch.testing.assert_close(keys, expected, rtol=0, atol=tolerance)
            torch.testing.assert_close(values, -expected, rtol=0, atol=tolerance)

    @invariant()
    def no_block_is_lost_or_owned_twice(self) -> None:
        single = self.manager.coordinator.single_type_managers[0]
        owned = [block.block_id for blocks in single.req_to_blocks.values() for block in blocks]
        assert len(owned) == len(set(owned))
        assert self.manager.block_pool.get_num_free_blocks() + len(owned) == self.n_blocks - 1  # one is the null block
        known = {request.request_id for request in (*self.loop.running, *self.loop.waiting)}
        for table in (single.prompt_lens, single.answering, single.shrunk):
            assert set(table) <= known

    @invariant()
    def nobody_holds_more_than_its_budget(self) -> None:
        single = self.manager.coordinator.single_type_managers[0]
        for request in self.loop.running:
            name = request.request_id
            held, most = len(single.req_to_blocks[name]), None
            if name in single.answering:  # a resumed request may pass its prompt in the middle of a step
                most = single.phase(name).budget
            elif self.retention.bounded:
                most = self.retention.budget_of(request.num_prompt_tokens) + self.retention.segment
            if most is not None:
                n_pages = -(-most // N) + self.layout.n_staging_blocks
                assert held <= -(-n_pages // self.pages_per_block)

    def teardown(self) -> None:
        for request in (*self.loop.running, *self.loop.waiting):
            self.manager.free(request)
        assert self.manager.block_pool.get_num_free_blocks() == self.n_blocks - 1


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention_module, "SEGMENT", 32)


def machine_of(name: str, **settings_of_it: Any) -> type[Retaining]:
    return type(name, (Retaining,), settings_of_it)


def machine(name: str, **settings_of_it: Any) -> type:
    case: type = machine_of(name, **settings_of_it).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
    return case


BOUNDED = Retention(budget=64, recent=None, sinks=0, rank="attention", bounded=True, interval=1, block_size=N)
BLOCKS = Retention(budget=0.5, recent=8, sinks=1, rank="attention", bounded=True, interval=N, block_size=N)
WINDOW = Retention(budget=80, recent=1, sinks=4, rank="age", bounded=False, interval=N, block_size=N)


def test_pressure_is_met() -> None:
    """The machines above would show nothing if nobody ever had to give: six answers grow on a pool for four."""
    state = machine_of("Met", evicting=True)()
    for _ in range(6):
        state.arrive(30)
    for _ in range(150):
        state.step(30)
        state.everybody_keeps_what_the_definition_keeps()
        state.no_block_is_lost_or_owned_twice()
    loop: Any = state.loop
    assert loop.n_preemptions_avoided > 3
    assert loop.n_tokens_evicted > 0
    assert loop.n_blocks_taken > 0


def test_all_cache_groups_give_alike() -> None:
    """A hybrid model may have several groups of evicting layers, and the workers hear of one budget."""
    spec = spec_of(Retaining.retention)
    config = KVCacheConfig(2 * N_BLOCKS, [], [KVCacheGroupSpec([name], spec) for name in ("a", "b")])
    manager = KVCacheManager(config, MAX_LEN, scheduler_block_size=N, hash_block_size=N, enable_caching=False)
    loop = EvictingLoop(manager)
    for i in range(6):
        sampling = SamplingParams(max_tokens=150, ignore_eos=True)
        sampling.update_from_generation_config({}, 2)
        loop.waiting.append(Request(f"r{i}", [1] * 30, sampling, None))
    one, other = manager.coordinator.single_type_managers
    for _ in range(150):
        for request in loop.running:
            if request.num_tokens == request.num_computed_tokens < MAX_LEN:
                request.append_output_token_ids(1)
        output = loop.schedule(30)
        for request in loop.running:
            request.num_computed_tokens += output.num_scheduled_tokens.get(request.request_id, 0)
        assert one.shrunk == other.shrunk
        assert {name: len(blocks) for name, blocks in one.req_to_blocks.items()} == {
            name: len(blocks) for name, blocks in other.req_to_blocks.items()
        }
    assert one.shrunk


@pytest.mark.parametrize(("fmt", "room"), [("model", 5 + 2), ("int8", 8 + 5)])
def test_a_preempted_answer_comes_back_into_what_it_keeps(fmt: str, room: int) -> None:
    """Its prompt is short, and of what it has answered no more stays than its budget: nothing else must fit.

    In blocks: a budget of 80 tokens takes 5, another's prompt of 20 takes 2, all 185 tokens would take 12; and each 3
    more for staging where blocks are quantized.
    """
    manager = new_manager(spec_of(WINDOW, fmt), n_blocks=N_BLOCKS)
    knowing_prompts(manager)
    sampling = SamplingParams(max_tokens=170, ignore_eos=True)
    sampling.update_from_generation_config({}, 2)
    request, other = (Request(name, [1] * 20, sampling, None) for name in ("r", "other"))
    request.append_output_token_ids([1] * 165)
    free = manager.block_pool.get_num_free_blocks()
    assert manager.allocate_slots(request, 20, full_sequence_must_fit=True) is not None
    manager.free(request)  # a preemption
    assert manager.block_pool.get_num_free_blocks() == free
    held = manager.block_pool.get_new_blocks(free - room)
    assert manager.allocate_slots(request, 20, full_sequence_must_fit=True) is not None
    assert manager.allocate_slots(other, 20, full_sequence_must_fit=True) is not None
    for one in (request, other):
        manager.free(one)
    manager.block_pool.free_blocks(held)
    (retaining,) = manager.coordinator.single_type_managers
    assert not retaining.prompt_lens


TestOneAtATime = machine("OneAtATime")
TestUnderPressure = machine("UnderPressure", evicting=True)
TestBounded = machine("Bounded", retention=BOUNDED, evicting=True)
TestBlocksOfCodes = machine("BlocksOfCodes", retention=BLOCKS, fmt="int8")
LARGE: dict[str, Any] = dict(n_blocks=10, pages_per_block=3)
TestOneAtATimeInLargeBlocks = machine("OneAtATimeInLargeBlocks", evicting=True, **LARGE)
TestBoundedInLargeBlocks = machine("BoundedInLargeBlocks", retention=BOUNDED, **LARGE)
TestCodesInLargeBlocks = machine("CodesInLargeBlocks", retention=BLOCKS, fmt="int8", evicting=True, **LARGE)
TestCodesUnderPressure = machine("CodesUnderPressure", retention=WINDOW, fmt="int8", by_score=False, evicting=True)


def spec_of(retention: Retention, fmt: str = "model") -> Any:
    return page_spec(PLAIN, layout_of(fmt, attention=True), retention)


def test_the_scheduler_wants_something_to_take_from() -> None:
    with pytest.raises(ValueError, match="select --attention-backend h2o or streaming"):
        EvictingLoop(new_manager(PLAIN))
