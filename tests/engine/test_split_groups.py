"""Tensor parallelism wider than the KV heads: a worker has some query heads of a group, so it cannot choose for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.small_models import llama
from tests.engine.support import MODEL, Prompts
from tests.engine.test_processes import run_engine

pytestmark = pytest.mark.engine


def start(backend: str, options: dict[str, Any], workers: int) -> Any:
    """The configuration of an engine on the bundled model, which has 8 query heads on 2 KV heads."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(MODEL),
        attention_backend=backend,
        additional_config={"sparq": options},
        tensor_parallel_size=workers,
        skip_tokenizer_init=True,
    ).create_engine_config()


REFUSED = [
    ("sparq", {}, "read='sparq' chooses tokens .* or read 'dense'"),
    ("quest", {}, "read='spans' chooses tokens .* or read 'dense'"),
    ("kivi", {"read": "sparq"}, "read='sparq' chooses tokens .* or read 'dense'"),
    ("h2o", {}, "retention='heavy_hitter' chooses tokens .* or retention 'window'"),
    (
        "sparq",
        {"retention": "heavy_hitter"},
        "read='sparq' and retention='heavy_hitter' chooses .* or read 'dense' and retention 'window'",
    ),
]


@pytest.mark.parametrize("workers", [4, 8])
@pytest.mark.parametrize(("backend", "options", "message"), REFUSED)
def test_a_worker_that_would_choose_alone_is_refused(
    backend: str, options: dict[str, Any], message: str, workers: int
) -> None:
    """At 8 workers there would be no group left, and the mean value, with it the page, would change as well."""
    told = (
        rf"--tensor-parallel-size {workers} gives the query heads .* 2 KV heads to {workers // 2} workers, .*{message}"
    )
    with pytest.raises(ValueError, match=told):
        start(backend, options, workers)


@pytest.mark.parametrize(
    ("backend", "options", "workers"),
    [("sparq", {}, 2), ("h2o", {}, 2), ("kivi", {}, 8), ("flexgen", {}, 4), ("streaming", {}, 8)],
)
def test_others_may_start(backend: str, options: dict[str, Any], workers: int) -> None:
    start(backend, options, workers)


def test_pages_are_the_same_on_any_number_of_workers() -> None:
    from vllm_sparq.attention_backends.engine import PagedEngine, heads_of

    pages = set()
    for workers in (1, 2, 4, 8):
        config = start("kivi", {}, workers)
        engine = PagedEngine.of(config)
        assert engine is not None
        layout = engine.layout(heads_of(config.model_config, config.parallel_config), config.model_config.dtype)
        pages.add(str(layout.parts))
    assert len(pages) == 1


@pytest.fixture(scope="module")
def one_kv_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose four query heads share one KV head, with weights that tell tokens apart."""
    folder = tmp_path_factory.mktemp("one_kv_head")
    return llama(
        folder,
        seed=0,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )


@pytest.mark.long
def test_two_workers_share_a_kv_head(one_kv_head: Path, engine: Any) -> None:
    """What does not choose by query heads answers alike on both."""
    prompts = [[3 + i * i % 119 for i in range(n)] for n in (40, 300)]
    arguments = dict(model=str(one_kv_head), skip_tokenizer_init=True, max_model_len=2048)
    with engine("kivi", {}, **arguments) as llm:
        one = Prompts.answers(llm, prompts)
    kivi = dict(attention_backend="kivi", additional_config={"sparq": {}})
    two = run_engine(prompts, **arguments, **kivi, tensor_parallel_size=2)
    assert len(two["reports"]) == 2
    assert two["tokens"] == one
