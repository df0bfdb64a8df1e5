"""Which FlashAttention our times stand beside: what vLLM would use, over a vLLM of which no kernel is here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_sparq.benchmarks.gpu.rivals import Attention, first_rival

Fake = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes of vLLM one that has some versions of FlashAttention and would use one of them; gives what it is asked."""

    def make(own: int | None, has: set[int], broken: frozenset[int] = frozenset()) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def run(*_: Any, fa_version: int, **__: Any) -> int:
            if fa_version in broken:
                raise ValueError(f"no kernel of {fa_version}")
            return fa_version

        def choose(**said: Any) -> int | None:
            asked.append(said)
            return own

        flash, utils = ModuleType("vllm.vllm_flash_attn"), ModuleType("vllm.v1.attention.backends.fa_utils")
        vars(flash).update(
            is_fa_version_supported=has.__contains__,
            fa_version_unsupported_reason=lambda version: f"FA{version} is unavailable",
            flash_attn_varlen_func=run,
        )
        vars(utils)["get_flash_attn_version"] = choose
        for module in (flash, utils):
            package, _, name = module.__name__.rpartition(".")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setattr(sys.modules[package], name, module, raising=False)
        return asked

    import vllm.v1.attention.backends  # noqa: F401  what the modules are put into

    return make


def found() -> tuple[str, object, dict[str, str]]:
    """The rival of a step, what it runs, and what is absent."""

    def ready(step: Callable[[], object]) -> Callable[[], object]:
        got = step()
        return lambda: got

    wanted = Attention(query=torch.zeros(2, 4, 128), n_kv_heads=2, requests=2, context=32)
    name, step, absent = first_rival(wanted, ready)
    return name, step(), absent


@pytest.mark.parametrize("own", [2, 3, 4])
def test_the_rival_is_what_vllm_would_use(own: int, fake: Fake) -> None:
    """On Hopper that is version 3, though 4 is there too."""
    asked = fake(own, {2, 3, 4})
    assert found() == (f"vLLM FlashAttention {own}", own, {})
    assert asked == [{"head_size": 128}]


def test_a_version_that_does_not_run_gives_way_to_the_next(fake: Fake) -> None:
    fake(3, {2, 3}, frozenset({3}))
    name, ran, absent = found()
    assert (name, ran) == ("vLLM FlashAttention 2", 2)
    assert absent == {"vllm_flash 3": "ValueError: no kernel of 3", "vllm_flash 4": "RuntimeError: FA4 is unavailable"}


def test_other_packages_come_after_all_versions(fake: Fake) -> None:
    fake(4, {2, 3, 4}, frozenset({2, 3, 4}))
    name, _, absent = found()
    assert name == "sdpa"
    assert [key for key in absent if key.startswith("vllm")] == ["vllm_flash 4", "vllm_flash 3", "vllm_flash 2"]


def test_where_vllm_names_none_what_is_there_is_tried(fake: Fake) -> None:
    fake(None, {2})
    name, _, absent = found()
    assert name == "vLLM FlashAttention 2"
    assert absent["vllm_flash"] == "RuntimeError: vLLM uses no FlashAttention on this device"


def test_without_vllm_its_absence_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    name, _, absent = found()
    assert name == "sdpa"
    assert [key for key in absent if key.startswith("vllm")] == ["vllm_flash"]


def test_a_lost_device_is_not_passed_over(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(3, {2, 3})

    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("vllm.vllm_flash_attn.flash_attn_varlen_func", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        found()
