"""What cannot be served is refused before the model loads, with the value, the rule and the remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.engine.support import MODEL

pytestmark = pytest.mark.engine

BAD_OPTIONS = [
    ({"comprssion": 4}, r"unknown sparq option 'comprssion'. Did you mean 'compression'\?.*dense_below"),
    ({"r": 65}, r"r=65 is larger than the model's head size 64: use r <= 64"),
    ({"k": 0}, r"k=0 is not usable: .*greater than or equal to 1"),
    ({"compression": 0.5}, r"compression=0.5 .*greater than or equal to 1"),
    ({"r": "many"}, r"r='many' .*valid integer"),
    ({"format": "int3"}, r"format='int3' is not usable: .*'int8', 'int4', 'kivi4' or 'kivi2'"),
    ({"format": "int4", "group_size": 48}, r"group_size=48 does not fit head size 64: .*multiple of 8.*leave it out"),
    ({"format": "int8", "group_size": 64}, r"'int8' has no groups, but group_size=64"),
    ({"dense_below": -1}, r"dense_below=-1 .*'auto' or a number of tokens >= 0"),
]


def start(model: Path = MODEL, options: dict | None = None, **engine_args: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(
        model=str(model),
        attention_backend="sparq",
        additional_config={"sparq": options or {}},
        skip_tokenizer_init=True,
        load_format="dummy",
        **engine_args,
    ).create_engine_config()


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(options=options)


def test_all_reasons_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)k=0.*--kv-cache-dtype fp8.*leave --kv-cache-dtype out"):
        start(options={"k": 0}, kv_cache_dtype="fp8")


def test_block_size() -> None:
    with pytest.raises(ValueError, match=r"--block-size 24 .*multiple of 16"):
        start(block_size=24)


def test_blocks_below_the_group() -> None:
    with pytest.raises(ValueError, match=r"block size 16 does not hold whole groups of 32 tokens.*--block-size 128"):
        start(options={"format": "kivi2"}, block_size=16)


def test_two_quantized_caches() -> None:
    with pytest.raises(ValueError, match=r"--kv-cache-dtype fp8 is vLLM's own quantized cache.*leave --kv-cache-dtype"):
        start(options={"format": "int4"}, kv_cache_dtype="fp8")


def test_drafts_over_quantized_blocks() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    with pytest.raises(ValueError, match=r"format='kivi4' quantizes a block when it fills.*--speculative-config"):
        start(options={"format": "kivi4"}, speculative_config=ngram)


EVICTING = {"retention": "heavy_hitter", "budget": 512}


def test_drafts_where_tokens_are_evicted() -> None:
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    with pytest.raises(ValueError, match=r"retention='heavy_hitter' evicts tokens, so draft tokens.*retention 'all'"):
        start(options=EVICTING, speculative_config=ngram)


def test_a_connector_where_tokens_are_evicted() -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match=r"KV connector copies dense K and V.*--kv-transfer-config"):
        start(options=EVICTING, kv_transfer_config=connector)


def test_a_budget_below_a_block() -> None:
    """Codes go a block at a time, and the block's size is known only here."""
    with pytest.raises(ValueError, match=r"budget=200 is too small: .*128 go at a time, so use budget >= 256"):
        start(options={**EVICTING, "budget": 200, "format": "int4"}, block_size=128)


def test_somebody_elses_scheduler_under_pressure() -> None:
    with pytest.raises(ValueError, match=r"pressure='evict' is the work of our scheduler.*leave it out"):
        start(
            options={**EVICTING, "pressure": "evict"},
            scheduler_cls="vllm.v1.core.sched.async_scheduler.AsyncScheduler",
        )


def test_prefix_caching_is_switched_off_where_tokens_are_evicted() -> None:
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(MODEL),
        attention_backend="h2o",
        additional_config={"sparq": {"pressure": "evict"}},
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    assert not config.cache_config.enable_prefix_caching
    assert config.scheduler_config.scheduler_cls == "vllm_sparq.scheduler.scheduler.EvictingScheduler"


def altered(folder: Path, **changes: Any) -> Path:
    """The bundled model's configuration with some values changed."""
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "head size": (dict(head_dim=40, hidden_size=320), r"head size 40 is not one of \[64, 80, 96, 128, 256\]"),
    "soft cap": (
        dict(
            architectures=["Gemma2ForCausalLM"],
            model_type="gemma2",
            attn_logit_softcapping=50.0,
            query_pre_attn_scalar=64,
            sliding_window=512,
        ),
        r"soft-capped logits \(attn_logit_softcapping=50.0\)",
    ),
    "ALiBi": (
        dict(architectures=["BloomForCausalLM"], model_type="bloom", n_head=8, n_layer=2, hidden_size=512),
        r"ALiBi adds a bias",
    ),
    "MLA": (
        dict(
            architectures=["DeepseekV2ForCausalLM"],
            model_type="deepseek_v2",
            kv_lora_rank=64,
            q_lora_rank=64,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
        ),
        r"multi-head latent attention",
    ),
    "encoder-decoder": (
        dict(architectures=["WhisperForConditionalGeneration"], model_type="whisper"),
        r"encoder-decoder models are not supported",
    ),
    "shared KV cache": (
        dict(
            architectures=["Gemma3nForCausalLM"],
            model_type="gemma3n_text",
            num_kv_shared_layers=2,
            layer_types=["full_attention"] * 4,
        ),
        r"num_kv_shared_layers=2",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tmp_path: Path) -> None:
    changes, message = MODELS[case]
    with pytest.raises(ValueError, match=message) as failure:
        start(altered(tmp_path, **changes))
    assert re.search(r"leave --attention-backend out|set --dtype", str(failure.value)), "no remedy in the message"


def test_good_model_is_not_refused() -> None:
    start()
