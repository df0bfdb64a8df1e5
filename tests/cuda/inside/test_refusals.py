"""What does not run on CUDA is refused at start; what might not, does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import EXACT, Prompts

SMALL: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=32 << 20)


def test_a_gpu_before_ampere(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    older = classmethod(lambda *_, **__: DeviceCapability(7, 5))
    monkeypatch.setattr(type(current_platform), "get_device_capability", older)
    with pytest.raises(ValueError, match=r"compute capability 7\.5.*need 8\.0 \(Ampere\) or newer: use vLLM's own"):
        engine("sparq", **SMALL).__enter__()


def test_microbatches(engine: Any) -> None:
    with pytest.raises(
        ValueError, match=r"microbatches \(--enable-dbo, --ubatch-size\) are not supported: .*leave them"
    ):
        engine("sparq", enable_dbo=True, **SMALL).__enter__()


def test_lossless(engine: Any) -> None:
    with pytest.raises(ValueError, match="lossless=True runs on CPU alone so far"):
        engine("sparq", {"lossless": True}, **SMALL).__enter__()


def test_infllm(engine: Any) -> None:
    with pytest.raises(ValueError, match="read='infllm' runs on CPU alone so far: use read 'sparq' or 'spans'"):
        engine("infllm", **SMALL).__enter__()


@pytest.mark.parametrize("block_size", [16, 48, 272])
def test_blocks_of_any_size_go_through_flash_attention(block_size: int, engine: Any, prompts: Any) -> None:
    """The stand-in refuses blocks that are no multiple of 16, as FlashAttention does; so do we."""
    half = dict(dtype="bfloat16", block_size=block_size, **SMALL)
    with engine("sparq", EXACT["sparse"], **half) as llm:
        assert len(Prompts.answers(llm, [prompts.of_length(300)], 3)[0]) == 3
