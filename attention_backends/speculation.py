"""What speculative decoding cannot be combined with, as `.refusals` says it."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from vllm_sparq.attention_backends.engine import DRAFTER, PagedEngine

WITHOUT_LAYERS = ("ngram", "suffix", "custom_class")
"""Values of ``method`` whose drafts come from no model with a KV cache of its own, which would be quantized too."""


def speculation_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """Drafts that could not be taken back."""
    options, speculative = engine.options, vllm_config.speculative_config
    reasons = lossless_refusals(vllm_config, engine)
    if speculative is None or options.lossless:
        return reasons
    if options.retention != "all":
        reasons.append(
            f"retention={options.retention!r} evicts tokens, so draft tokens cannot be taken back: start without "
            "--speculative-config, or with retention 'all'"
        )
    elif engine.quantized and speculative.method not in WITHOUT_LAYERS:
        reasons.append(
            f"format={options.format!r} quantizes a block when it fills, so the layers of a drafting model "
            f"(method {speculative.method!r}) could not take back what they have drafted: use method 'ngram' or "
            "'suffix', start without --speculative-config, or with format 'model'"
        )
    elif engine.quantized and current_platform.is_cuda():
        reasons.append(
            f"speculative decoding over format={options.format!r} runs on CPU alone so far: start without "
            "--speculative-config, or with format 'model'"
        )
    return reasons


def lossless_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """What a model that drafts for itself cannot be combined with."""
    options, parallel, speculative = engine.options, vllm_config.parallel_config, vllm_config.speculative_config
    if not options.lossless:
        return []
    model, reasons = vllm_config.model_config, []
    if current_platform.is_cuda():
        reasons.append("runs on CPU alone so far")
    if not engine.reads_sparsely:
        reasons.append(f"drafts by a sparse read, and read={options.read!r} is none: use read 'sparq' or 'spans'")
    if options.format != "model" or options.retention != "all":
        reasons.append("takes drafts back, which blocks of codes and evicted tokens do not allow: use format 'model'")
    if speculative is not None and speculative.model != DRAFTER:
        reasons.append("is speculative decoding itself: leave --speculative-config out")
    if parallel.world_size > 1:
        reasons.append("runs on one worker so far: leave --tensor-parallel-size and --pipeline-parallel-size out")
    if vllm_config.lora_config is not None or model.uses_mrope or model.is_hybrid:
        reasons.append("does not know adapters, M-RoPE and layers with a state: use another model, or leave LoRA out")
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    if len(kinds) > 1:
        reasons.append(f"needs layers of one kind, and this model's are {', '.join(sorted(kinds))}")
    return [f"sparq option lossless=True {reason}" for reason in reasons]
