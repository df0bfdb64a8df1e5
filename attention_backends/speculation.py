"""What speculative decoding cannot be combined with, as `.refusals` says it."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.platforms import current_platform

from vllm_sparq.attention_backends.engine import DRAFTER, PagedEngine, heads_of
from vllm_sparq.reads import READS

WITHOUT_LAYERS = ("ngram", "suffix", "custom_class")
"""Values of ``method`` whose drafts come from no model with a KV cache of its own, which would be quantized too."""

HEADS = ("eagle",)
"""Those whose drafts come from a head that follows the model's own steps, so that what it writes can be taken back.
Other heads (eagle3, mtp) may be like it; they were never run over codes, so they are refused."""


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
    elif READS[options.read].own_ranking:
        reasons.append(
            f"read={options.read!r} adds up the queries of all tokens, so draft tokens cannot be taken back: start "
            "without --speculative-config, or with read 'sparq' or 'spans'"
        )
    elif engine.quantized and speculative.method not in WITHOUT_LAYERS + HEADS:
        reasons.append(
            f"format={options.format!r} quantizes a block when it fills, so the layers of a drafting model "
            f"(method {speculative.method!r}) could not take back what they have drafted: use method 'ngram', 'suffix' "
            "or 'eagle', start without --speculative-config, or with format 'model'"
        )
    elif engine.quantized and speculative.method in HEADS and (reason := _head_refusal(vllm_config)):
        reasons.append(
            f"format={options.format!r} {reason}, start without --speculative-config, or with format 'model'"
        )
    elif engine.quantized and current_platform.is_cuda():
        reasons.append(
            f"speculative decoding over format={options.format!r} runs on CPU alone so far: start without "
            "--speculative-config, or with format 'model'"
        )
    return reasons


def _head_refusal(vllm_config: Any) -> str | None:
    """Why a drafting head cannot have its K and V in the quantized pages of its model; None if it can."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    if speculative.parallel_drafting:
        return "takes drafts back one by one, and parallel_drafting makes several at once: leave parallel_drafting out"
    ours, theirs = (heads_of(model, parallel) for model in (vllm_config.model_config, speculative.draft_model_config))
    if (ours.head_size, ours.n_kv_heads) != (theirs.head_size, theirs.n_kv_heads):
        return (
            f"quantizes pages of one shape, and the drafting head has {theirs.n_kv_heads} KV heads of size "
            f"{theirs.head_size}, the model {ours.n_kv_heads} of {ours.head_size}: use a head of the model's shape"
        )
    return None


def lossless_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """What a model that drafts for itself cannot be combined with."""
    options, parallel, speculative = engine.options, vllm_config.parallel_config, vllm_config.speculative_config
    if not options.lossless:
        return []
    model, reasons = vllm_config.model_config, []
    if current_platform.is_cuda():
        reasons.append("runs on CPU alone so far: leave lossless out")
    if not engine.reads_sparsely:
        reasons.append(f"drafts by a sparse read, and read={options.read!r} is none: use read 'sparq' or 'spans'")
    if options.format != "model" or options.retention != "all":
        reasons.append(
            "takes drafts back, which blocks of codes and evicted tokens do not allow, got "
            f"format={options.format!r} and retention={options.retention!r}: use format 'model' and retention 'all'"
        )
    if speculative is not None and speculative.model != DRAFTER:
        reasons.append("is speculative decoding itself: leave --speculative-config out")
    if parallel.pipeline_parallel_size > 1:
        reasons.append("runs whole models alone so far: leave --pipeline-parallel-size out")
    if parallel.data_parallel_size > 1 and model.is_moe:
        reasons.append(
            "drafts by each engine's own clock, and engines that share experts step together: leave "
            "--data-parallel-size out"
        )
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        reasons.append("needs vLLM's model runner V1, since V2 takes no proposers: unset VLLM_USE_V2_MODEL_RUNNER")
    for found, what, remedy in (
        (vllm_config.lora_config is not None, "LoRA adapters", "--enable-lora"),
        (model.uses_mrope, "positions of several dimensions (M-RoPE)", "lossless"),
        (model.is_hybrid, "layers with a state", "lossless"),
    ):
        if found:
            reasons.append(f"does not know {what}: leave {remedy} out")
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    if len(kinds) > 1:
        reasons.append(f"needs layers of one kind, and this model's are {', '.join(sorted(kinds))}: leave lossless out")
    return [f"sparq option lossless=True {reason}" for reason in reasons]
