"""Which scheduler an engine gets, and what happens to somebody else's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import MODEL

pytestmark = pytest.mark.engine

THEIRS = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


def chosen(backend: str, options: dict[str, Any], **engine_args: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(MODEL),
        attention_backend=backend,
        additional_config={"sparq": options},
        skip_tokenizer_init=True,
        **engine_args,
    ).create_engine_config()
    return config.scheduler_config.scheduler_cls


@pytest.mark.parametrize(
    ("backend", "options", "name"),
    [
        ("sparq", {}, "prompts.{}PromptCachingScheduler"),
        ("quest", {"sharing": "all"}, "prompts.{}PromptCachingScheduler"),
        ("streaming", {}, "prompts.{}PromptCachingScheduler"),
        ("h2o", {"pressure": "evict"}, "scheduler.{}EvictingScheduler"),
    ],
)
def test_ours_where_decoded_tokens_are_not_a_prompts(backend: str, options: dict[str, Any], name: str) -> None:
    for ahead in (False, True):
        ours = f"vllm_sparq.scheduler.{name.format('Async' if ahead else '')}"
        assert chosen(backend, options, async_scheduling=ahead) == ours


@pytest.mark.parametrize("backend", ["kivi", "flexgen"])
def test_vllms_own_where_they_are(backend: str) -> None:
    assert chosen(backend, {}) is None
    assert chosen(backend, {}, scheduler_cls=THEIRS) == THEIRS


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("sparq", {}, r"sharing='prompts' is the work of our scheduler.*leave it out, or set sharing to 'all'"),
        ("h2o", {}, r"retention='heavy_hitter' needs our scheduler.*leave it out$"),
        ("h2o", {"pressure": "evict"}, r"pressure='evict' is the work of our scheduler.*leave it out$"),
        ("sparq", {"retention": "window"}, r"retention='window' needs our scheduler.*leave it out$"),
    ],
)
def test_somebody_elses_is_refused(backend: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?m)--scheduler-cls names {THEIRS}") as failure:
        chosen(backend, options, scheduler_cls=THEIRS)
    assert failure.match(rf"(?m){message}")


def test_somebody_elses_may_share_what_was_decoded() -> None:
    assert chosen("sparq", {"sharing": "all"}, scheduler_cls=THEIRS) == THEIRS
