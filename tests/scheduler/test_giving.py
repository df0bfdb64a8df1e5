"""Which request gives a block under ``pressure: evict``, and what it costs to find it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from tests.scheduler.test_retaining import MAX_LEN, EvictingLoop, N, new_manager, spec_of
from vllm_sparq.retention import Retention

RETENTION = Retention(budget=64, recent=4, sinks=0, rank="attention", bounded=False, interval=1, block_size=N)


class Watched(EvictingLoop):
    """Looks at all requests of the step before one of them gives, and counts the looks of who chooses.

    Attributes:
        n_looks: evaluations of a request's room since the step began.
        n_given: times that a request gave a block.
        n_shared: times that several had the most room.
        n_asking: times that the request that asked had the most.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.granted: list[Request] = []
        self.n_looks = self.n_given = self.n_shared = self.n_asking = 0

    def schedule(self, chunk: int) -> Any:
        self.granted.clear()
        return super().schedule(chunk)

    def _allocate_or_evict(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        blocks = super()._allocate_or_evict(request, *args, **kwargs)
        if blocks is not None:
            self.granted.append(request)
        return blocks

    def _spare_room(self, request: Request, *, asking: bool) -> int:
        self.n_looks += 1
        return super()._spare_room(request, asking=asking)

    def _take_a_block(self, asking: Request) -> bool:
        rooms = [super(Watched, self)._spare_room(request, asking=False) for request in self.granted]
        rooms.append(super()._spare_room(asking, asking=True))
        most, before = max(rooms), dict(self._managers[0].shrunk)
        found = super()._take_a_block(asking)
        now = self._managers[0].shrunk
        changed = {name: phase.budget for name, phase in now.items() if before.get(name) is not phase}
        if not most:
            assert (found, changed) == (False, {})
            return found
        giving = [*self.granted, asking][rooms.index(most)]
        assert (found, changed) == (True, {giving.request_id: most - N})
        self.n_given += 1
        self.n_shared += rooms.count(most) > 1
        self.n_asking += giving is asking
        return found


def new_request(name: str, n_prompt: int) -> Request:
    sampling = SamplingParams(max_tokens=MAX_LEN - n_prompt, ignore_eos=True)
    sampling.update_from_generation_config({}, 2)
    return Request(name, [1] * n_prompt, sampling, None)


def run(loop: Watched, chunk: int) -> SimpleNamespace:
    """A step of the engine."""
    for request in loop.running:
        if request.num_tokens == request.num_computed_tokens < MAX_LEN:
            request.append_output_token_ids(1)
    output: SimpleNamespace = loop.schedule(chunk)
    for request in loop.running:
        request.num_computed_tokens += output.num_scheduled_tokens.get(request.request_id, 0)
    return output


@pytest.mark.parametrize("n_requests", [100, 400])
def test_a_batch_that_asks_at_once_looks_at_each_a_few_times(n_requests: int) -> None:
    """All cross the end of a block in one step, over a pool that holds what they have and not a block more."""
    loop = Watched(new_manager(spec_of(RETENTION), 3 * n_requests + 1))
    loop.waiting += [new_request(f"r{i}", 2 * N) for i in range(n_requests)]
    run(loop, 2 * N)
    for _ in range(N):
        loop.n_looks = 0
        run(loop, 1)
    assert (loop.n_given, loop.n_looks) == (0, 0)  # without pressure nobody is looked at
    run(loop, 1)
    assert loop.n_given >= n_requests
    assert loop.n_looks <= 5 * n_requests


def random_run(seed: int) -> Watched:
    """Requests of any lengths come, grow, are preempted and end."""
    rng = random.Random(seed)
    loop, n_made = Watched(new_manager(spec_of(RETENTION), 60)), 0
    for _ in range(150):
        if rng.random() < 0.5:
            n_made += 1
            loop.waiting.append(new_request(f"r{n_made}", rng.choice((20, 32, 60, 100, 150))))
        if loop.running and rng.random() < 0.1:
            loop.kv_cache_manager.free(loop.running.pop(rng.randrange(len(loop.running))))
        if loop.running and rng.random() < 0.05:
            loop.preempt(loop.running.pop(rng.randrange(len(loop.running))))
            loop.n_preempted = 0
        rng.shuffle(loop.running)  # as priorities do
        run(loop, rng.choice((1, 1, 1, 30)))
    return loop


def test_who_gives_has_the_most_room_and_came_first() -> None:
    """`Watched` compares each choice with the plain maximum's; here it has many to compare, of all kinds."""
    loops = [random_run(seed) for seed in range(20)]
    assert sum(loop.n_given for loop in loops) > 500
    assert sum(loop.n_shared for loop in loops) > 300
    assert sum(loop.n_asking for loop in loops) > 20


def test_who_is_preempted_gives_no_more() -> None:
    """By priority vLLM may preempt a request that is part of the step already."""
    loop = Watched(new_manager(spec_of(RETENTION), 60))
    loop.waiting += [new_request(f"r{i}", n) for i, n in enumerate((150, 40, 150, 60, 150, 60))]
    for _ in range(30):
        run(loop, 150)
    outsider, n_running = new_request("outsider", 20), len(loop.running)
    assert n_running == 6
    while loop._take_a_block(outsider):
        if len(loop.running) > 3 and loop.n_given % 2:
            loop.preempt(loop.running.pop(0))
    assert loop.n_given > n_running
