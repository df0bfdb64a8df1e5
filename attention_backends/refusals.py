"""What cannot be served, said before the model loads: the feature, the value, the remedy."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparq.attention_backends.engine import PagedEngine, heads_of
from vllm_sparq.config import OptionsError, check_budget
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE

HEAD_SIZES = (64, 80, 96, 128, 256)
"""Head sizes the kernels are compiled for."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16")
"""Values of --kv-cache-dtype that mean the model's own type."""

DENSE = "use vLLM's own backend (leave --attention-backend out)"


def engine_refusals(vllm_config: Any) -> list[str]:
    """Reasons why an engine with this configuration cannot run on our backends; empty if it can."""
    reasons = _option_refusals(vllm_config)
    reasons += _cache_refusals(vllm_config.cache_config)
    if vllm_config.model_config is not None:
        reasons += model_refusals(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    for flag, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            reasons.append(f"{flag} {size} splits a request's tokens over workers, which is not supported: set it to 1")
    if vllm_config.kv_transfer_config is not None:
        reasons.append("a KV connector copies dense K and V, our pages hold more: start without --kv-transfer-config")
    return reasons


def _option_refusals(vllm_config: Any) -> list[str]:
    try:
        engine = PagedEngine.of(vllm_config)
    except ValueError as error:
        return [str(error)]
    model = vllm_config.model_config
    if engine is None or model is None or model.use_mla:
        return []
    reasons = _format_refusals(vllm_config, engine)
    try:
        engine.read(heads_of(model, vllm_config.parallel_config))
    except ValueError as error:
        reasons.append(str(error))
    return reasons


def _format_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """Pages that cannot be cut, and what quantized blocks rule out."""
    model, block_size, options = vllm_config.model_config, engine.block_size, engine.options
    if model.get_head_size() not in HEAD_SIZES or model.dtype not in DTYPES or block_size % BLOCK_SIZE_MULTIPLE:
        return []  # refused on its own account
    reasons = []
    try:
        layout = engine.layout(heads_of(model, vllm_config.parallel_config), model.dtype)
    except ValueError as error:
        return [f"sparq options: {error}"]
    try:
        check_budget(options, block_size)
    except OptionsError as error:
        reasons.append(str(error))
    if options.retention != "all" and vllm_config.speculative_config is not None:
        reasons.append(
            f"retention={options.retention!r} evicts tokens, so draft tokens cannot be taken back: start without "
            "--speculative-config, or with retention 'all'"
        )
    if layout.quantized is not None and vllm_config.speculative_config is not None:
        reasons.append(
            f"format={options.format!r} quantizes a block when it fills, so draft tokens cannot be taken back: start "
            "without --speculative-config, or with format 'model'"
        )
    return reasons


def _cache_refusals(cache_config: Any) -> list[str]:
    reasons = []
    if cache_config.cache_dtype not in KV_CACHE_DTYPES:
        reasons.append(
            f"--kv-cache-dtype {cache_config.cache_dtype} is vLLM's own quantized cache, which our pages replace: "
            "leave --kv-cache-dtype out"
        )
    if cache_config.block_size is not None and cache_config.block_size % BLOCK_SIZE_MULTIPLE:
        reasons.append(
            f"--block-size {cache_config.block_size} cannot be cut into pages: use a multiple of {BLOCK_SIZE_MULTIPLE} "
            "(128 is fastest on CPU)"
        )
    return reasons


def model_refusals(model_config: Any) -> list[str]:
    """Reasons why this model cannot run on our backends, from its configuration alone; empty if it can."""
    config = model_config.hf_text_config
    if model_config.use_mla:
        return [f"multi-head latent attention (MLA) has no per-head K and V to read sparsely: {DENSE}"]
    if model_config.is_encoder_decoder:
        return [f"encoder-decoder models are not supported, only decoders: {DENSE}"]
    if model_config.is_attention_free:
        return [f"the model has no attention layers: {DENSE}"]
    reasons = []
    if model_config.runner_type != "generate":
        reasons.append(f"the {model_config.runner_type} runner does not decode token by token: {DENSE}")
    if model_config.get_head_size() not in HEAD_SIZES:
        reasons.append(f"head size {model_config.get_head_size()} is not one of {list(HEAD_SIZES)}: {DENSE}")
    if model_config.dtype not in DTYPES:
        reasons.append(f"dtype {model_config.dtype} is not bfloat16, float16 or float32: set --dtype")
    if _uses_alibi(config):
        reasons.append(f"ALiBi adds a bias to the scores that our kernels do not know: {DENSE}")
    for attribute in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(config, attribute, None):
            reasons.append(f"soft-capped logits ({attribute}={getattr(config, attribute)}) are not supported: {DENSE}")
    if getattr(config, "num_kv_shared_layers", None):
        reasons.append(
            f"layers that share one KV cache (num_kv_shared_layers={config.num_kv_shared_layers}) are not supported: "
            f"{DENSE}"
        )
    return reasons


def _uses_alibi(config: Any) -> bool:
    """The ways in which models on the hub say that they use ALiBi."""
    attn_config = getattr(config, "attn_config", None) or {}
    if not isinstance(attn_config, dict):
        attn_config = vars(attn_config)
    return bool(
        getattr(config, "model_type", None) == "bloom"
        or getattr(config, "alibi", False)
        or getattr(config, "use_alibi", False)
        or str(getattr(config, "position_embedding", getattr(config, "position_embedding_type", ""))).lower() == "alibi"
        or attn_config.get("alibi", False)
    )


def layer_refusals(selector_config: Any) -> list[str]:
    """Reasons why one attention layer, as vLLM describes it, cannot run on our backends; empty if it can."""
    reasons = []
    if selector_config.head_size not in HEAD_SIZES:
        reasons.append(f"head size {selector_config.head_size} is not one of {list(HEAD_SIZES)}: {DENSE}")
    if selector_config.dtype not in DTYPES:
        reasons.append(f"dtype {selector_config.dtype} is not bfloat16, float16 or float32: set --dtype")
    if selector_config.attn_type != "decoder":
        reasons.append(f"{selector_config.attn_type} attention is not supported, only decoders: {DENSE}")
    for feature, wanted in (
        ("multi-head latent attention", selector_config.use_mla),
        ("attention sinks", selector_config.has_sink),
        ("the model's own sparse attention", selector_config.use_sparse),
        ("bidirectional prefixes", selector_config.use_mm_prefix),
        ("non-causal attention", selector_config.use_non_causal),
        ("reference sliding windows", selector_config.use_rswa),
        ("batch-invariant kernels (VLLM_BATCH_INVARIANT)", selector_config.use_batch_invariant),
    ):
        if wanted:
            reasons.append(f"{feature} are not supported: {DENSE}")
    return reasons


def impl_refusals(
    *,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    kv_sharing_target_layer_name: str | None,
    sinks: Any = None,
) -> list[str]:
    """Reasons that show only when vLLM builds the layer; the last line of defence behind `model_refusals`."""
    reasons = []
    if alibi_slopes is not None:
        reasons.append(f"ALiBi adds a bias to the scores that our kernels do not know: {DENSE}")
    if logits_soft_cap:
        reasons.append(f"soft-capped logits (cap {logits_soft_cap}) are not supported: {DENSE}")
    if kv_sharing_target_layer_name is not None:
        reasons.append(f"sharing the KV cache of {kv_sharing_target_layer_name} is not supported: {DENSE}")
    if sinks is not None:
        reasons.append(f"attention sinks are not supported: {DENSE}")
    return reasons
