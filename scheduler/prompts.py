"""A scheduler for engines whose decode steps write other K and V than a prompt of the same tokens would.

A step that reads few tokens, or after an eviction, attends to less than a row of a prompt does, and so do all layers
above it; but vLLM takes what was decoded for what a prompt would have written. In three places that would make an
answer depend on what the engine did before:

* *Prefix caching*: blocks with decoded tokens would be found by prompts that hold the same tokens, such as the next
  turn of a conversation. Here only blocks are shared that hold what a prompt wrote (unless ``sharing`` is ``all``).
* *Preemption*: a request that comes back would take its own output tokens from blocks that another's prompt has
  written. Here it finds no more than its prompt.
* *Sessions* (vLLM's resumable requests, whose prompt goes on after an answer): what was decoded would become part of a
  prompt. Here a session starts again with each turn, as the same conversation in one prompt would.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sparq.attention_backends.choices import asked_for, chosen
from vllm_sparq.attention_backends.engine import PagedEngine, heads_of
from vllm_sparq.counters import Counters
from vllm_sparq.reads import HeadShape
from vllm_sparq.scheduler.drafting import DraftsInPagesMixin
from vllm_sparq.scheduler.manager import knowing_prompts

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = init_logger("vllm.sparq")


class PromptCachingMixin(DraftsInPagesMixin):
    """What both schedulers add to vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        engine = PagedEngine.of(config)
        assert engine is not None
        self._shares_all = engine.options.sharing == "all"
        self._engine, self._heads = engine, heads_of(config.model_config, config.parallel_config)
        self._max_model_len: int = config.model_config.max_model_len
        self._loops = TokenLoops()
        self._n_chosen = {"dense_requests": 0, "tuned_requests": 0}
        self._counters = Counters.of(config, config.parallel_config.data_parallel_index)
        self._counting = contextlib.ExitStack()
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        self._lookup, manager.get_computed_blocks = manager.get_computed_blocks, self._computed_blocks
        knowing_prompts(manager)
        coordinator = manager.coordinator
        self._cache, coordinator.cache_blocks = coordinator.cache_blocks, self._cache_blocks

    def add_request(self, request: Request) -> None:
        """As vLLM does, and tell whoever runs the server that a client gets nothing out of it, or what it chose."""
        options = chosen(self._engine, self._heads, _asked(request))
        if options is not None:
            name = "dense_requests" if options.read != self._engine.options.read else "tuned_requests"
            self._n_chosen[name] += 1
            self.count(**self._n_chosen)
        if self._loops.found_by(request):
            logger.warning_once(
                "a client asks for one token at a time (max_tokens=1, as beam search does): each of its steps is a "
                "prompt, which is read in full, so that this backend saves it nothing. Ask for more tokens a request, "
                "or serve such clients without --attention-backend"
            )
        super().add_request(request)  # type: ignore[misc]

    def count(self, **counts: int) -> None:
        """Let the front end publish counts of this engine, by name; they only grow."""
        if not self._counters.is_open:
            self._counting.enter_context(self._counters.writing())
            atexit.register(self._counting.close)
        self._counters.write(**counts)

    def shutdown(self) -> None:
        """The engine ends, and what it has counted with it."""
        self._counting.close()
        super().shutdown()  # type: ignore[misc]

    def _n_as_prompt(self, request: Request) -> int:
        """How many first tokens of a request have the K and V that a prompt would have given them."""
        if self._shares_all:
            return request.num_tokens
        dense_up_to = _dense_up_to(self._engine, self._heads, _asked(request), self._max_model_len)
        return max(request.num_prompt_tokens, dense_up_to)

    def _cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """`KVCacheCoordinator.cache_blocks`, for all cache groups: what attends to less changes every layer above."""
        self._cache(request, min(num_computed_tokens, self._n_as_prompt(request)))

    def _computed_blocks(self, request: Request, *limits: Any) -> Any:
        """`KVCacheManager.get_computed_blocks`, as if the request had no more tokens than these.

        From 0.33 on vLLM may limit a hit further.
        """
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        known = request.block_hashes
        request.block_hashes = known[: self._n_as_prompt(request) // manager.block_pool.hash_block_size]
        try:
            return self._lookup(request, *limits)
        finally:
            request.block_hashes = known

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """As vLLM does, and give back all blocks, so that the whole conversation is read as a prompt."""
        super()._update_request_as_session(session, update)
        if not self._shares_all:
            self._free_request_blocks(session)  # type: ignore[attr-defined]
            session.num_computed_tokens = 0


def _asked(request: Request) -> str | None:
    """What a request asks to be read of it."""
    params = request.sampling_params
    return None if params is None else asked_for(params.extra_args)


@functools.lru_cache(maxsize=1024)
def _dense_up_to(engine: PagedEngine, heads: HeadShape, asked: str | None, max_model_len: int) -> int:
    """The longest context that is read in full as all shorter ones are, of a request that asked for this."""
    options = chosen(engine, heads, asked) or engine.options
    return options.read_of(heads).dense_up_to(max_model_len)


class PromptCachingScheduler(PromptCachingMixin, Scheduler):
    """vLLM's scheduler that takes for a prompt what a prompt has written."""


class AsyncPromptCachingScheduler(PromptCachingMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler that takes for a prompt what a prompt has written."""


class TokenLoops:
    """Finds clients that send their prompt again for each token: a begin in common, one token more, one token asked.

    Attributes:
        steps: (first tokens of a prompt, its length) -> how often in a row it had grown by a token by then.
    """

    HEAD, ENOUGH, REMEMBERED = 32, 16, 256

    def __init__(self) -> None:
        self.steps: OrderedDict[tuple[tuple[int, ...], int], int] = OrderedDict()

    def found_by(self, request: Request) -> bool:
        """Whether this request makes it certain."""
        prompt = request.prompt_token_ids
        if request.max_tokens != 1 or not prompt:
            return False
        head = tuple(prompt[: self.HEAD])
        n_steps = self.steps.get((head, len(prompt) - 1), 0) + 1
        self.steps[head, len(prompt)] = max(n_steps, self.steps.get((head, len(prompt)), 0))
        if len(self.steps) > self.REMEMBERED:
            self.steps.popitem(last=False)
        return n_steps >= self.ENOUGH
