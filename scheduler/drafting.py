"""A scheduler that keeps slots free for the tokens which a model drafts for itself (`attention_backends.drafting`)."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class DraftingScheduler(Scheduler):
    """vLLM keeps such slots for proposers that it knows to write K and V; it cannot know it of one of our own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_lookahead_tokens = self.num_spec_tokens
