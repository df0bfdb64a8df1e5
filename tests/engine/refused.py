"""Configurations that cannot work, and what users read about each, however they start it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.support import MODEL, NGRAM
from vllm_sparq.formats import FORMATS

EVICTING = {"retention": "heavy_hitter", "budget": 512}
MOVED = {"retention": "window", "prefill": "bounded", "read": "dense", "positions": "capped", "budget": 128}
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
# Weights stay as they are: vLLM has no FP8 matrix products on CPU.
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "ignore": ["*_proj*"]}
COMPRESSED_TENSORS = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8_SCHEME}
FOREIGN_WORKER = "vllm.v1.worker.gpu_worker.Worker"


@dataclass(frozen=True)
class Case:
    """A configuration that cannot work, and what the user reads about it.

    Attributes:
        message: a pattern with the value, the rule and the remedy.
        model: changes of the bundled model's configuration.
        options: of ``additional_config["sparq"]``.
        arguments: of the engine; flags of `vllm serve` in Python's spelling.
        environment: variables.
        doctor: the same of doctor, which looks at options before it looks at a model.
    """

    message: str
    model: dict[str, Any] = field(default_factory=dict)
    options: Any = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    doctor: str | None = None


def options(given: Any, message: str, **arguments: Any) -> Case:
    return Case(message, options=given, arguments=arguments)


def arguments(message: str, **given: Any) -> Case:
    return Case(message, arguments=given)


def model(message: str, **changes: Any) -> Case:
    return Case(message, model=changes)


DENSE = r".*leave --attention-backend out"
CASES: dict[str, Case] = {
    "unknown option": options(
        {"comprssion": 4}, r"unknown sparq option 'comprssion'. Did you mean 'compression'\?.*dense_below"
    ),
    "options that are no object": options([4], r"must be an object of options, got \[4\].*write for example"),
    "more of the newest than are read": options(
        {"k": 64, "local": 65}, r"local=65 is more than k=64.*use local <= 64, or k >= 65"
    ),
    "r beyond the head": options({"r": 65}, r"r=65 is larger than the model's head size 64: use r <= 64"),
    "k of nothing": options({"k": 0}, r"k=0 is not usable: .*greater than or equal to 1"),
    "no sparse layer": options(
        {"read": "spans", "dense_layers": 4}, r"dense_layers=4 leaves none of the model's 4 layers .*use less than 4"
    ),
    "no sparse layer, by a preset": Case(
        r"dense_layers=2 \(the default of quest\) leaves none of the model's 2 layers .*such as \"dense_layers\": 0",
        model=dict(num_hidden_layers=2),
        arguments=dict(attention_config={"backend": "QUEST"}),
    ),
    "compression below 1": options({"compression": 0.5}, r"compression=0.5 .*greater than or equal to 1"),
    "r in words": options({"r": "many"}, r"r='many' .*valid integer"),
    "no such format": options({"format": "int3"}, rf"format='int3' is not usable: .*or {[*FORMATS][-1]!r}"),
    "group across heads": options(
        {"format": "int4", "group_size": 48},
        r"group_size=48 does not fit head size 64: .*multiple of 8.*leave it out",
    ),
    "group of nothing": options({"format": "int8", "group_size": 64}, r"'int8' has no groups, but group_size=64"),
    "dense below zero": options({"dense_below": -1}, r"dense_below=-1 .*'auto' or a number of tokens from 0"),
    "a budget while all stay": options(
        {"budget": 512}, r"budget=512 means nothing while all tokens stay: add retention"
    ),
    "the newest of a window": options(
        {"retention": "window", "recent": 64}, r"recent=64 means nothing with retention 'window'.*set budget and sinks"
    ),
    "r over spans": options({"read": "spans", "r": 8}, r"r=8 means nothing with read 'spans'.*or leave it out"),
    "codes where keys are chosen": options(
        {"read": "infllm", "format": "int8"}, r"format='int8' leaves codes where read 'infllm' chooses.*format 'model'"
    ),
    "drafts whose queries were added up": options(
        {"read": "infllm"},
        r"read='infllm' adds up the queries of all tokens, so draft tokens.*read 'sparq' or 'spans'",
        speculative_config=NGRAM,
    ),
    "a budget below a block": options(  # codes go a block at a time, and the block's size is known only here
        {**EVICTING, "budget": 200, "format": "int4"},
        r"budget=200 is too small: .*128 go at a time, so use budget >= 256",
        block_size=128,
    ),
    "blocks below the group": options(
        {"format": "kivi2"}, r"block size 16 does not hold whole groups of 32 tokens.*--block-size 128", block_size=16
    ),
    "drafts over codes": options(
        {"format": "kivi4"},
        r"format='kivi4' quantizes a block when it fills.*method 'draft_model'.*use method 'ngram'",
        speculative_config={"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 3},
    ),
    "drafts where tokens go": options(
        EVICTING,
        r"retention='heavy_hitter' evicts tokens, so draft tokens.*retention 'all'",
        speculative_config=NGRAM,
    ),
    "somebody else's scheduler": options(
        {**EVICTING, "pressure": "evict"},
        r"pressure='evict' is the work of our scheduler.*leave it out",
        scheduler_cls="vllm.v1.core.sched.async_scheduler.AsyncScheduler",
    ),
    "pressure beside windows": Case(
        r"pressure='evict' hands a block over.*use pressure 'preempt'",
        model=dict(
            architectures=["Gemma3ForCausalLM"],
            model_type="gemma3_text",
            query_pre_attn_scalar=64,
            sliding_window=512,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        options={**EVICTING, "pressure": "evict"},
    ),
    "two backends": arguments(
        r"the backends kivi and sparq are presets of the same options and cannot be mixed: select one",
        attention_config={"backend": "SPARQ", "backend_per_kind": {"sliding_window": "KIVI"}},
    ),
    "block size": arguments(r"--block-size 24 .*multiple of 16", block_size=24),
    "vLLM's fp8 cache": arguments(
        r"--kv-cache-dtype fp8 is vLLM's own quantized cache.*leave --kv-cache-dtype out", kv_cache_dtype="fp8"
    ),
    "two reasons": Case(
        r"(?s)k=0.*--kv-cache-dtype fp8.*leave --kv-cache-dtype out",
        options={"k": 0},
        arguments=dict(kv_cache_dtype="fp8"),
        doctor=r"k=0 is not usable",
    ),
    "another type of cache": arguments(
        r"--kv-cache-dtype bfloat16 is not the model's own type, float32.*leave --kv-cache-dtype out, or add --dtype",
        dtype="float32",
        kv_cache_dtype="bfloat16",
    ),
    "a connector": arguments(
        r"KV connector copies dense K and V.*start without --kv-transfer-config",
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    ),
    "offloading": arguments(
        r"--kv-offloading-size 0.1 starts a KV connector.*start without --kv-offloading-size", kv_offloading_size=0.1
    ),
    "a worker of CUDA's": arguments(
        rf"--worker-cls {FOREIGN_WORKER} does not tell our layers.*leave --worker-cls out, or derive the class from "
        r"vllm_sparq.attention_backends.cpu_worker.SparqCpuWorker",
        worker_cls=FOREIGN_WORKER,
    ),
    "a worker of nobody's": arguments(
        r"--worker-cls no.such.Worker cannot be imported \(.*\): leave --worker-cls out", worker_cls="no.such.Worker"
    ),
    "batch-invariant kernels": Case(
        r"batch-invariant kernels \(VLLM_BATCH_INVARIANT\) are not supported: unset it",
        environment={"VLLM_BATCH_INVARIANT": "1"},
    ),
    "fp8 by ModelOpt": model(
        r"checkpoint declares a KV cache of type fp8.*set --kv-cache-dtype bfloat16", quantization_config=MODELOPT
    ),
    "fp8 by compressed-tensors": model(
        r"checkpoint declares a KV cache of type fp8.*set --kv-cache-dtype bfloat16",
        quantization_config=COMPRESSED_TENSORS,
    ),
    "fp8 and a model of 32 bits": Case(
        r"checkpoint declares a KV cache of type fp8.*set --dtype bfloat16 and --kv-cache-dtype bfloat16",
        model=dict(quantization_config=COMPRESSED_TENSORS),
        arguments=dict(dtype="float32"),
    ),
    "head size": model(rf"head size 40 is not one of \[32, 48, 64, .*256, 512\]{DENSE}", head_dim=40, hidden_size=320),
    "ALiBi": model(
        rf"ALiBi adds a bias{DENSE}",
        architectures=["BloomForCausalLM"],
        model_type="bloom",
        n_head=8,
        n_layer=2,
        hidden_size=512,
    ),
    "MLA": model(
        rf"multi-head latent attention{DENSE}",
        architectures=["DeepseekV2ForCausalLM"],
        model_type="deepseek_v2",
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
    ),
    "encoder-decoder": model(
        rf"encoder-decoder models are not supported{DENSE}",
        architectures=["WhisperForConditionalGeneration"],
        model_type="whisper",
    ),
    "eviction from shared KV caches": Case(
        r"retention='heavy_hitter' evicts tokens from caches .*num_kv_shared_layers=2\): use retention",
        model=dict(
            architectures=["Gemma3nForCausalLM"],
            model_type="gemma3n_text",
            num_kv_shared_layers=2,
            layer_types=["full_attention"] * 4,
        ),
        options=EVICTING,
    ),
    "rows left out over shared KV caches": arguments(
        r"--kv-sharing-fast-prefill leaves rows out .*: leave it out", kv_sharing_fast_prefill=True
    ),
    "no attention": model(
        rf"^(?s:(?!.*larger than).*)the model has no attention layers{DENSE}",  # whatever options would say of no heads
        architectures=["MambaForCausalLM"],
        model_type="mamba",
        state_size=16,
    ),
    "chunks only": model(
        rf"no layer has full attention \(layer_types: chunked_attention\){DENSE}",
        architectures=["Llama4ForCausalLM"],
        model_type="llama4_text",
        attention_chunk_size=512,
        num_local_experts=2,
        no_rope_layers=[1] * 4,
        layer_types=["chunked_attention"] * 4,
    ),
    "positions over angles that do not compose": Case(
        r"the model has rope_parameters .*'dynamic'.*: set positions 'original'",
        model=dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}),
        options=MOVED,
    ),
    "a window beyond training": options(
        {**MOVED, "trained": 300, "budget": 128},
        r"budget=128 and the 256 tokens of a prompt .* are 384, more than the 300 .*: use budget <= 44, or say",
    ),
    "another runner": arguments(rf"the pooling runner does not decode token by token{DENSE}", runner="pooling"),
    "windows only": model(
        rf"no layer has full attention \(layer_types: sliding_attention\){DENSE}",
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        query_pre_attn_scalar=64,
        sliding_window=512,
        layer_types=["sliding_attention"] * 4,
    ),
}


def altered(folder: Path, changes: dict[str, Any]) -> Path:
    """The bundled model's configuration with some values changed, and its tokenizer."""
    config = json.loads((MODEL / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(MODEL / name)
    return folder


def flags(case: Case) -> Iterator[str]:
    """The engine's arguments as `vllm serve` takes them, but for the backend and its options."""
    for name, value in case.arguments.items():
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def backend_flags(case: Case) -> Iterator[str]:
    """The backend and its options; a case may choose backends itself."""
    if "attention_config" not in case.arguments:
        yield from ("--attention-backend", "sparq")
    yield from ("--additional-config", json.dumps({"sparq": case.options}))
