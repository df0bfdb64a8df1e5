"""What does not run on CUDA is refused at start; what might not, does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.support import EXACT, NGRAM, Prompts

SMALL: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=32 << 20)


def test_a_gpu_before_ampere(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    older = classmethod(lambda *_, **__: DeviceCapability(7, 5))
    monkeypatch.setattr(type(current_platform), "get_device_capability", older)
    with pytest.raises(ValueError, match=r"compute capability 7\.5.*need 8\.0 \(Ampere\) or newer: use vLLM's own"):
        engine("sparq", **SMALL).__enter__()


def test_full_graphs_of_the_first_model_runner(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It replays the graph of decodes for the last token of a prompt, too, which is never read sparsely."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match=r"model runner V1, .* replays full graphs .*or start with --enforce-eager"):
        engine("sparq", EXACT["sparse"], **SMALL).__enter__()


def test_microbatches(engine: Any) -> None:
    with pytest.raises(
        ValueError, match=r"microbatches \(--enable-dbo, --ubatch-size\) are not supported: .*leave them"
    ):
        engine("sparq", enable_dbo=True, **SMALL).__enter__()


@pytest.mark.parametrize(
    ("backend", "options", "more", "message"),
    [
        ("sparq", {"lossless": True}, {}, "lossless=True runs on CPU alone so far"),
        ("infllm", {}, {}, "read='infllm' runs on CPU alone so far: use read 'sparq' or 'spans'"),
        (
            "streaming",
            {"positions": "renumbered", "prefill": "bounded"},
            {},
            "positions='renumbered' runs on CPU alone so far: set positions 'original'",
        ),
        ("kivi", {}, {"speculative_config": NGRAM}, "over format='kivi4' runs on CPU alone so far: start without"),
    ],
)
def test_previews(backend: str, options: dict[str, Any], more: dict[str, Any], message: str, engine: Any) -> None:
    with pytest.raises(ValueError, match=message):
        engine(backend, options, **SMALL, **more).__enter__()


def test_a_choice_for_each_request(engine: Any) -> None:
    """The request is refused, and the next one answered."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with engine("sparq", EXACT["sparse"], **SMALL) as llm:
        for extra in ({"sparq": "off"}, {"sparq.k": 64}):
            with pytest.raises(VLLMValidationError, match="on CPU alone so far: on CUDA start an engine"):
                llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(extra_args=extra), use_tqdm=False)
        assert len(Prompts.answers(llm, [[5, 6, 7]], 3)[0]) == 3


@pytest.mark.parametrize("block_size", [16, 48, 272])
def test_blocks_of_any_size_go_through_flash_attention(block_size: int, engine: Any, prompts: Any) -> None:
    """The stand-in refuses blocks that are no multiple of 16, as FlashAttention does; so do we."""
    half = dict(dtype="bfloat16", block_size=block_size, **SMALL)
    with engine("sparq", EXACT["sparse"], **half) as llm:
        assert len(Prompts.answers(llm, [prompts.of_length(300)], 3)[0]) == 3
