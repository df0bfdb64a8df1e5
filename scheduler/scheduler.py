"""A scheduler that evicts before it preempts (option ``pressure: evict``).

A request that finds no free block makes vLLM preempt another, which loses its whole cache and is computed again. Here
requests that are past their prompt give up a block each instead, those with the most first: the scheduler lowers their
budgets, their workers evict the coldest tokens before anything is written in the same step, and the blocks change hands
within it. What a budget becomes depends on the load, and with it the answer; under ``pressure: preempt`` it does not.

The workers learn of a lowered budget with every step that concerns the request, so they remember nothing, and all ranks
of a tensor-parallel group hear the same.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_sparq.retention import PHASES
from vllm_sparq.scheduler.manager import RetainingManager
from vllm_sparq.scheduler.prompts import PromptCachingMixin
from vllm_sparq.scheduler.spec import SHARED_POOL

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.sparq")

LEAST_SHARE = 4
"""A budget is never lowered below a quarter of what the request would keep without pressure."""


class EvictingMixin:
    """What both schedulers add to vLLM's own.

    Attributes:
        n_blocks_taken: blocks that requests gave up.
        n_tokens_evicted: tokens per KV head that they evicted for it at once.
        n_preemptions_avoided: times that a request got its block this way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator: Any = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        self._managers = [m for m in coordinator.single_type_managers if isinstance(m, RetainingManager)]
        if not self._managers:
            raise ValueError(
                f"{type(self).__name__} takes blocks from requests that may evict, and none may here: select "
                "--attention-backend h2o or streaming (or a retention), or leave --scheduler-cls out"
            )
        specs: list[Any] = [manager.kv_cache_spec for manager in self._managers]
        if any(spec.shares_pool for spec in specs):
            raise ValueError(f"vllm-sparq cannot start: {SHARED_POOL}")
        if any(manager.retention != self._managers[0].retention for manager in self._managers):
            raise ValueError(
                "cache groups that keep different numbers of tokens cannot give blocks: use pressure 'preempt'"
            )
        self._granted: list[Request] = []
        self._rooms: list[tuple[int, int]] = []  # a heap: what they had, negated, and their places in `_granted`
        self.n_blocks_taken = self.n_tokens_evicted = self.n_preemptions_avoided = 0
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        self._allocate = manager.allocate_slots
        manager.allocate_slots = self._allocate_or_evict

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM does, and tell the workers which budgets are lower than they think."""
        self._granted.clear()
        self._rooms.clear()
        before = self.n_preemptions_avoided
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        shrunk = self._managers[0].shrunk
        phases = {name: phase for name, phase in shrunk.items() if name in output.num_scheduled_tokens}
        setattr(output, PHASES, phases)
        if self.n_preemptions_avoided > before:
            counts = dict(blocks_taken=self.n_blocks_taken, preemptions_avoided=self.n_preemptions_avoided)
            self.count(**counts)  # type: ignore[attr-defined]
            logger.info_once("the KV cache is full: running requests evict more tokens instead of being preempted")
        return output

    def _allocate_or_evict(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """`KVCacheManager.allocate_slots`, with blocks of others where a running request finds none."""
        blocks = self._allocate(request, *args, **kwargs)
        if blocks is None and request.status == RequestStatus.RUNNING:
            while blocks is None and self._take_a_block(request):
                blocks = self._allocate(request, *args, **kwargs)
            self.n_preemptions_avoided += blocks is not None
        if blocks is not None:
            self._granted.append(request)
        return blocks

    def _take_a_block(self, asking: Request) -> bool:
        """Lower a budget by a block: of the request that holds most, among those of this step and the one that asks.

        Only requests that are already part of the step can give: their workers evict in it. The one that asks gives by
        growing no further.
        """
        own = self._spare_room(asking, asking=True)
        room, request = max(self._most_room(), (own, asking), key=lambda found: found[0])
        if not room:
            return False
        assert request is not None
        manager = self._managers[0]
        budget, position = room - manager.block_size, request.num_computed_tokens
        phase = manager.retention.shrunk(manager.phase(request.request_id), position, budget)
        self.n_tokens_evicted += manager.retention.arrival(position, 0, phase).n_evicted
        for manager in self._managers:  # all cache groups keep the same number of tokens
            manager.shrunk[request.request_id] = phase
            self.n_blocks_taken += manager.give_back(request.request_id)
        return True

    def _most_room(self) -> tuple[int, Request | None]:
        """The most room among the requests of this step, and the first that has it.

        A heap, since a batch whose requests all ask in one step would otherwise look at all of them for each. The room
        of a request that is part of the step only shrinks, when it gives or is preempted; so the heap may say too much
        of one, never too little, and its first is the one as soon as what it says of that is true.
        """
        for place in range(len(self._rooms), len(self._granted)):
            heapq.heappush(self._rooms, (-self._spare_room(self._granted[place], asking=False), place))
        while self._rooms:
            negated, place = self._rooms[0]
            room = self._spare_room(self._granted[place], asking=False)
            if room == -negated:
                return room, self._granted[place]
            heapq.heapreplace(self._rooms, (-room, place))
        return 0, None

    def _spare_room(self, request: Request, *, asking: bool) -> int:
        """Tokens for which a request holds, or asks for, blocks in each cache group, if one less will do; else 0."""
        manager = self._managers[0]
        if request.request_id not in manager.answering:
            return 0
        budget, size = manager.phase(request.request_id).budget, manager.block_size
        spec: Any = manager.kv_cache_spec
        room: int = len(manager.req_to_blocks[request.request_id]) * size - spec.n_staging_pages * spec.page_tokens
        if asking and room < budget:
            room += size
        would_keep = min(manager.retention.budget_of(request.num_prompt_tokens), request.num_computed_tokens)
        least = max(manager.retention.least_budget, would_keep // LEAST_SHARE)
        return room if room - size >= least else 0


class EvictingScheduler(EvictingMixin, PromptCachingMixin, Scheduler):
    """vLLM's scheduler that evicts before it preempts."""


class AsyncEvictingScheduler(EvictingMixin, PromptCachingMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler that evicts before it preempts."""
