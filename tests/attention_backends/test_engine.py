"""`PagedEngine.of`: what an engine runs, from vLLM's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparq.attention_backends import engine
from vllm_sparq.config import Options, OptionsError


def config(**options: Any) -> Any:
    """As much of vLLM's configuration as is asked."""
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="SPARQ"), backend_per_kind={}),
        additional_config={"sparq": options},
        cache_config=SimpleNamespace(block_size=128),
    )


def test_options_are_parsed_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Platform, worker, backend, every layer and the scheduler ask, each with a configuration of its own."""
    parsed: list[Any] = []
    parse = engine.parse_options

    def counted(given: Any, backend: str) -> Options:
        parsed.append(given)
        return parse(given, backend)

    monkeypatch.setattr(engine, "parse_options", counted)
    engine._parsed.cache_clear()
    engines = [engine.PagedEngine.of(config(compression=3.0)) for _ in range(3)]
    assert len({*engines}) == 1
    assert len(parsed) == 1
    other = engine.PagedEngine.of(config(compression=5.0))
    assert other is not None
    assert other.options.compression == 5.0
    assert len(parsed) == 2


def test_options_beside_our_key_are_refused_at_start() -> None:
    misplaced = config()
    misplaced.additional_config = {"compression": 4}
    with pytest.raises(OptionsError, match="is read by nothing"):
        engine.PagedEngine.of(misplaced)
