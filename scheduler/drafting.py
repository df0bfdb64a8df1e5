"""Schedulers for drafts: room for those of the model itself, and an end where a quantized page would fill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_sparq.scheduler.spec import StagedSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request


class DraftingScheduler(Scheduler):
    """vLLM keeps slots for proposers that it knows to write K and V; it cannot know it of one of our own.

    See `vllm_sparq.attention_backends.drafting`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_lookahead_tokens = self.num_spec_tokens


class DraftsInPagesMixin:
    """Drafts stay in the page of the token before them, and do not fill it.

    A page becomes codes when it fills, and from then on the next page's tokens are staged where its own were: neither
    can be taken back. So a draft is only ever staged, and the token that fills a page is one that was accepted. What a
    rejected draft has left lies behind the tokens of its request, and the next ones take its slots.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator: Any = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        specs: list[Any] = [manager.kv_cache_spec for manager in coordinator.single_type_managers]
        self._page_tokens = {spec.page_tokens for spec in specs if isinstance(spec, StagedSpec)}

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """As vLLM does, and keep of each request's drafts those that can be taken back."""
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]
        requests: Any = self.requests  # type: ignore[attr-defined]
        for request_id in draft_token_ids.req_ids if self._page_tokens else ():
            request = requests.get(request_id)
            if request is not None and request.spec_token_ids:
                request.spec_token_ids = request.spec_token_ids[: self._most_drafts(request)]

    def _update_request_as_session(self, session: Request, update: Any) -> None:
        """As vLLM does; but a turn of one token, which it fills up with drafts, starts again where these do not fit."""
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        n_filled_up: int = self.num_spec_tokens  # type: ignore[attr-defined]
        one_token = session.num_tokens - session.num_computed_tokens == 1
        if self._page_tokens and one_token and self._most_drafts(session) < n_filled_up:
            self._free_request_blocks(session)  # type: ignore[attr-defined]
            session.num_computed_tokens = 0

    def _most_drafts(self, request: Request) -> int:
        """How many drafts a request may bring, of all cache groups."""
        return min(most_drafts(request.num_tokens, size) for size in self._page_tokens)


def most_drafts(n_tokens: int, page_tokens: int) -> int:
    """Drafts after a request of so many tokens that stay in the page of the last one, without filling it."""
    return max(0, page_tokens - 2 - (n_tokens - 1) % page_tokens)


class DraftsInPagesScheduler(DraftsInPagesMixin, Scheduler):
    """vLLM's scheduler, for drafts over quantized pages that are read in full."""
