"""Which scheduler an engine gets, and what happens to somebody else's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import MODEL, NGRAM
from vllm_sparq.platform import EVICTING, PROMPT_CACHING

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
        ("sparq", {}, "prompts.PromptCachingScheduler"),
        ("quest", {"sharing": "all"}, "prompts.PromptCachingScheduler"),
        ("streaming", {}, "prompts.PromptCachingScheduler"),
        ("h2o", {"pressure": "evict"}, "scheduler.EvictingScheduler"),
    ],
)
def test_ours_where_decoded_tokens_are_not_a_prompts(backend: str, options: dict[str, Any], name: str) -> None:
    assert chosen(backend, options) == f"vllm_sparq.scheduler.{name}"


def test_ours_runs_ahead_where_vllm_would() -> None:
    """vLLM's CPU platform switches asynchronous scheduling off; elsewhere the choice is made after its own."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_sparq.scheduler.prompts import PromptCachingMixin

    for names in (EVICTING, PROMPT_CACHING):
        in_step, ahead = (resolve_obj_by_qualname(name) for name in names)
        assert not issubclass(in_step, AsyncScheduler)
        assert issubclass(ahead, AsyncScheduler)
        assert issubclass(ahead, PromptCachingMixin)


@pytest.mark.parametrize(
    ("backend", "options", "name"),
    [
        ("kivi", {}, "drafting.DraftsInPagesScheduler"),
        ("sparq", {"format": "int4", "sharing": "all"}, "prompts.PromptCachingScheduler"),
    ],
)
def test_ours_where_drafts_must_not_fill_a_block(backend: str, options: dict[str, Any], name: str) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_sparq.scheduler.drafting import DraftsInPagesMixin

    found = chosen(backend, options, speculative_config=NGRAM)
    assert found == f"vllm_sparq.scheduler.{name}"
    assert issubclass(resolve_obj_by_qualname(found), DraftsInPagesMixin)
    with pytest.raises(ValueError, match=r"scheduler.*--scheduler-cls names .*: leave it out(?!, or)"):
        chosen(backend, options, speculative_config=NGRAM, scheduler_cls=THEIRS)


@pytest.mark.parametrize("named", [*PROMPT_CACHING, *EVICTING])
def test_drafts_fill_no_block_under_any_of_ours_that_may_be_named(named: str) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_sparq.scheduler.drafting import DraftsInPagesMixin

    assert chosen("sparq", {"format": "int4"}, speculative_config=NGRAM, scheduler_cls=named) == named
    assert issubclass(resolve_obj_by_qualname(named), DraftsInPagesMixin)


@pytest.mark.parametrize("backend", ["kivi", "flexgen"])
def test_vllms_own_where_they_are(backend: str) -> None:
    assert chosen(backend, {}) is None
    assert chosen(backend, {}, scheduler_cls=THEIRS) == THEIRS


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("sparq", {}, r"sharing='prompts' is the work of our scheduler.*leave it out, or set sharing to 'all'"),
        ("h2o", {}, r"retention='heavy_hitter' needs our scheduler.*leave it out(?!, or)"),
        ("h2o", {"pressure": "evict"}, r"pressure='evict' is the work of our scheduler.*leave it out(?!, or)"),
        ("sparq", {"retention": "window"}, r"retention='window' needs our scheduler.*leave it out(?!, or)"),
    ],
)
def test_somebody_elses_is_refused(backend: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?m)--scheduler-cls names {THEIRS}") as failure:
        chosen(backend, options, scheduler_cls=THEIRS)
    assert failure.match(rf"(?m){message}")


def test_somebody_elses_may_share_what_was_decoded() -> None:
    assert chosen("sparq", {"sharing": "all"}, scheduler_cls=THEIRS) == THEIRS
