"""What cannot be served, said before the model loads: the feature, the value, the remedy."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from vllm import envs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

from vllm_sparq.attention_backends.engine import LOCAL_KINDS, PagedEngine, heads_of
from vllm_sparq.attention_backends.positions import position_refusals
from vllm_sparq.attention_backends.speculation import speculation_refusals
from vllm_sparq.backends import PRESETS
from vllm_sparq.config import Options, OptionsError, check_budget
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE
from vllm_sparq.reads import READS, SparseRead
from vllm_sparq.retention import EVICTING, adds_up_attention
from vllm_sparq.scheduler.spec import SHARED_POOL

HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes the kernels are compiled for."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16")
"""Values of --kv-cache-dtype that mean the model's own type."""

LEAST_CAPABILITY = 80
"""Of a GPU, ten times: what our Triton kernels are compiled for in the tests."""

CANNOT_START = "vllm-sparq cannot start: "
"""What a refusal begins with, wherever it is raised; doctor looks for it in what vLLM makes of the exception."""

DENSE = "use vLLM's own backend (leave --attention-backend out)"

ALIBI = f"ALiBi adds a bias to the scores that our kernels do not know: {DENSE}"

CONNECTOR = "a KV connector copies dense K and V, our pages hold more: start without "


def engine_refusals(vllm_config: Any) -> list[str]:
    """Reasons why an engine with this configuration cannot run on our backends; empty if it can."""
    reasons = _option_refusals(vllm_config)
    reasons += _block_size_refusals(vllm_config.cache_config) + _pressure_refusals(vllm_config)
    if vllm_config.model_config is not None:
        reasons += model_refusals(vllm_config.model_config, vllm_config.cache_config.cache_dtype)
    parallel = vllm_config.parallel_config
    reasons += _split_group_refusals(vllm_config)
    for flag, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            reasons.append(f"{flag} {size} splits a request's tokens over workers, which is not supported: set it to 1")
    reasons += _connector_refusals(vllm_config) + _switch_refusals(vllm_config) + _runner_refusals(vllm_config)
    return reasons + _device_refusals()


def _connector_refusals(vllm_config: Any) -> list[str]:
    """vLLM makes a connector of an offloading size, but only after it has asked us."""
    size = vllm_config.cache_config.kv_offloading_size
    if size is not None:
        return [f"--kv-offloading-size {size:g} starts a KV connector. {CONNECTOR}--kv-offloading-size"]
    if vllm_config.kv_transfer_config is not None:
        return [f"{CONNECTOR}--kv-transfer-config"]
    return []


def _switch_refusals(vllm_config: Any) -> list[str]:
    """Switches of the whole engine that ask of every layer what ours cannot do."""
    reasons = []
    if envs.VLLM_BATCH_INVARIANT:
        reasons.append(f"batch-invariant kernels (VLLM_BATCH_INVARIANT) are not supported: unset it, or {DENSE}")
    if vllm_config.attention_config.use_non_causal:
        reasons.append(f"non-causal attention (use_non_causal) is not supported: {DENSE}")
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reasons.append(
            "--kv-sharing-fast-prefill leaves rows out where layers share a KV cache, and ours know whole steps alone: "
            "leave it out"
        )
    if vllm_config.parallel_config.use_ubatching:
        reasons.append(
            "steps that are cut into microbatches (--enable-dbo, --ubatch-size) are not supported: our layers know the "
            "requests of whole steps; leave them out"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.enable_adaptive_verification:
        reasons.append(
            "enable_adaptive_verification trims drafts on the device, where our rows cannot follow: leave it out of "
            "--speculative-config"
        )
    return reasons


def _runner_refusals(vllm_config: Any) -> list[str]:
    """Ways of vLLM's to run a step that our workers do not hear of, or that replay a decode where a prompt ends."""
    reasons = []
    ray = vllm_config.parallel_config.distributed_executor_backend == "ray"
    if ray and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND:
        reasons.append(
            "vLLM's older Ray executor (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0) hands steps past our worker, which would "
            "not hear of budgets and of what requests have chosen: unset it"
        )
    mode = vllm_config.compilation_config.cudagraph_mode
    captures = current_platform.is_cuda() and mode is not None and mode.has_full_cudagraphs()
    if captures and vllm_config.model_config is not None and not vllm_config.use_v2_model_runner:
        reasons.append(
            "vLLM's model runner V1, which VLLM_USE_V2_MODEL_RUNNER=0 and some methods of speculative decoding take, "
            f"replays full graphs of decodes (cudagraph_mode {mode.name}) for the last tokens of prompts, which would "
            "be read sparsely: leave these out, or start with --enforce-eager"
        )
    return reasons


def _device_refusals() -> list[str]:
    """GPUs that our kernels are not compiled for."""
    if not current_platform.is_cuda() or current_platform.has_device_capability(LEAST_CAPABILITY):
        return []
    found = current_platform.get_device_capability()
    name = "unknown" if found is None else f"{found.major}.{found.minor}"
    least = f"{LEAST_CAPABILITY // 10}.{LEAST_CAPABILITY % 10}"
    return [f"this GPU has compute capability {name}, and our kernels need {least} (Ampere) or newer: {DENSE}"]


def worker_refusals(worker_cls: str, ours: str) -> list[str]:
    """Reasons why a class that the user named cannot be the worker of our layers; ``ours`` is the class to derive from.

    Without what our workers add, layers know neither their engine nor whose requests a step brings.
    """
    from vllm_sparq.attention_backends.worker import SparqWorkerMixin

    remedy = f"leave --worker-cls out, or derive the class from {ours}"
    try:
        found = resolve_obj_by_qualname(worker_cls)
    except (ImportError, AttributeError, ValueError) as error:
        return [f"--worker-cls {worker_cls} cannot be imported ({error}): {remedy}"]
    if isinstance(found, type) and issubclass(found, SparqWorkerMixin):
        return []
    return [f"--worker-cls {worker_cls} does not tell our layers whose requests a step brings: {remedy}"]


def _option_refusals(vllm_config: Any) -> list[str]:
    try:
        engine = PagedEngine.of(vllm_config)
    except ValueError as error:
        return [str(error)]
    model = vllm_config.model_config
    if engine is None or model is None or model.use_mla or model.is_attention_free:
        return []  # refused for what it is, which no option changes
    reasons = _format_refusals(vllm_config, engine) + speculation_refusals(vllm_config, engine)
    reasons += position_refusals(vllm_config, engine)
    reasons += _dense_layer_refusals(model, engine)
    if current_platform.is_cuda() and READS[engine.options.read].own_ranking:
        reasons.append(
            f"read={engine.options.read!r} runs on CPU alone so far: use read 'sparq' or 'spans', as the backends "
            "sparq and quest do"
        )
    try:
        engine.read(heads_of(model, vllm_config.parallel_config))
    except ValueError as error:
        reasons.append(str(error))
    return reasons


def _dense_layer_refusals(model: Any, engine: PagedEngine) -> list[str]:
    """A sparse read that no layer would do. Layers of a drafting model are not meant: theirs changes no answer."""
    n_layers, n_dense = getattr(model.hf_text_config, "num_hidden_layers", None), engine.options.dense_layers
    sparse = issubclass(READS[engine.options.read], SparseRead)
    if not sparse or not n_layers or n_dense < n_layers or model.runner_type == "draft":
        return []
    default = PRESETS[engine.backend].options.get("dense_layers")
    of_whom = f" (the default of {engine.backend})" if n_dense == default else ""
    return [
        f"dense_layers={n_dense}{of_whom} leaves none of the model's {n_layers} layers to be read sparsely: use less "
        f"than {n_layers}, such as \"dense_layers\": 0, or read='dense'"
    ]


def chosen_by_query_heads(options: Options) -> dict[str, str]:
    """Options that make a KV head choose tokens by all of its query heads -> what does not."""
    choosing = {}
    if issubclass(READS[options.read], SparseRead):
        choosing[f"read={options.read!r}"] = "read 'dense'"
    if adds_up_attention(options.retention):
        others = [repr(name) for name in EVICTING if not adds_up_attention(name)]
        choosing[f"retention={options.retention!r}"] = f"retention {' or '.join(others)}"
    return choosing


def _split_group_refusals(vllm_config: Any) -> list[str]:
    """Tensor parallelism wider than the KV heads: each worker would choose by its share of a query group."""
    model, size = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    try:
        engine = PagedEngine.of(vllm_config)
    except ValueError:
        return []  # refused on its own account
    if engine is None or model is None or model.use_mla or size == 1:
        return []
    n_kv_heads, choosing = model.get_total_num_kv_heads(), chosen_by_query_heads(engine.options)
    if size <= n_kv_heads or not choosing:
        return []
    return [
        f"--tensor-parallel-size {size} gives the query heads of each of the model's {n_kv_heads} KV heads to "
        f"{size // n_kv_heads} workers, and {' and '.join(choosing)} chooses tokens by all of them: use "
        f"--tensor-parallel-size {n_kv_heads}, with --pipeline-parallel-size or --data-parallel-size for more workers, "
        f"or {' and '.join(choosing.values())}"
    ]


def _format_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """Pages that cannot be cut, and what quantized blocks rule out."""
    model, block_size, options = vllm_config.model_config, engine.block_size, engine.options
    if model.get_head_size() not in HEAD_SIZES or model.dtype not in DTYPES or block_size % BLOCK_SIZE_MULTIPLE:
        return []  # refused on its own account
    reasons = []
    try:
        engine.layout(heads_of(model, vllm_config.parallel_config), model.dtype)
    except ValueError as error:
        return [f"sparq options: {error}"]
    try:
        check_budget(options, block_size)
    except OptionsError as error:
        reasons.append(str(error))
    n_shared = getattr(model.hf_text_config, "num_kv_shared_layers", None)
    if options.retention != "all" and n_shared:
        reasons.append(
            f"retention={options.retention!r} evicts tokens from caches that other layers read later in the same step "
            f"(num_kv_shared_layers={n_shared}): use retention 'all', as the backends sparq, quest, flexgen and kivi do"
        )
    return reasons


def _pressure_refusals(vllm_config: Any) -> list[str]:
    """Models whose layers are of several kinds, before they are loaded; the scheduler finds all others."""
    model, engine = vllm_config.model_config, None
    with contextlib.suppress(ValueError):  # refused on its own account
        engine = PagedEngine.of(vllm_config)
    if engine is None or model is None or engine.options.pressure != "evict":
        return []
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    return [SHARED_POOL] if model.is_hybrid or len(kinds) > 1 else []


def _block_size_refusals(cache_config: Any) -> list[str]:
    size = cache_config.block_size
    if size is None or size % BLOCK_SIZE_MULTIPLE == 0:
        return []
    return [
        f"--block-size {size} cannot be cut into pages: use a multiple of {BLOCK_SIZE_MULTIPLE} (128 is fastest on CPU)"
    ]


def cache_dtype_refusals(model_config: Any, cache_dtype: str) -> list[str]:
    """Reasons why blocks cannot be our pages: vLLM, or the checkpoint, would store K and V in another type.

    ``cache_dtype`` as vLLM has it by now: what a checkpoint of ModelOpt declares has taken the place of ``auto``, what
    one of compressed-tensors declares has not.
    """
    declared = declared_cache_dtype(model_config)
    name = str(model_config.dtype).removeprefix("torch.")
    if declared is not None and cache_dtype in ("auto", declared):
        half = name if name in KV_CACHE_DTYPES else "bfloat16"
        dtype = "" if half == name else f"--dtype {half} and "
        return [
            f"the checkpoint declares a KV cache of type {declared}, which our pages replace: set "
            f"{dtype}--kv-cache-dtype {half}"
        ]
    if cache_dtype not in KV_CACHE_DTYPES:
        return [
            f"--kv-cache-dtype {cache_dtype} is vLLM's own quantized cache, which our pages replace: "
            "leave --kv-cache-dtype out"
        ]
    if cache_dtype not in ("auto", name):
        return [
            f"--kv-cache-dtype {cache_dtype} is not the model's own type, {name}, in which our pages hold what is not "
            f"quantized: leave --kv-cache-dtype out, or add --dtype {cache_dtype}"
        ]
    return []


def declared_cache_dtype(model_config: Any) -> str | None:
    """The type of quantized KV cache that a checkpoint asks for where the user does not say otherwise, or None."""
    config = getattr(model_config.hf_config, "quantization_config", None)
    if config is None:
        return None
    if not isinstance(config, dict):
        config = config.to_dict()
    if config.get("quant_method") == "compressed-tensors":
        return "fp8" if config.get("kv_cache_scheme") else None  # the one type that vLLM makes of it
    declared: str | None = get_kv_cache_quant_algo_string(config)
    return None if declared == "auto" else declared


def model_refusals(model_config: Any, cache_dtype: str = "auto") -> list[str]:
    """Reasons why this model cannot run on our backends, from its configuration alone; empty if it can.

    ``cache_dtype`` is what ``--kv-cache-dtype`` says, or what vLLM has made of it.
    """
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
    reasons += cache_dtype_refusals(model_config, cache_dtype)
    reasons += _attention_refusals(model_config)
    if _uses_alibi(config):
        reasons.append(ALIBI)
    return reasons


def _attention_refusals(model_config: Any) -> list[str]:
    """Kinds of attention other than full and causal."""
    config = model_config.hf_text_config
    reasons = []
    kinds = getattr(config, "layer_types", None) or []
    if kinds and set(kinds) <= set(LOCAL_KINDS):
        reasons.append(
            f"no layer has full attention (layer_types: {', '.join(sorted(set(kinds)))}), so there is nothing to read "
            f"sparsely or to store smaller: {DENSE}"
        )
    window = model_config.rswa_window
    if window is not None:
        reasons.append(f"reference sliding windows (rswa_window={window}) are not supported: {DENSE}")
    if model_config.is_mm_prefix_lm:
        reasons.append(
            "images in bidirectional prefixes (is_mm_prefix_lm) are not supported: serve text alone with "
            f"""--limit-mm-per-prompt '{{"image": 0, "video": 0}}', or {DENSE}"""
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
        ("multi-head latent attention is", selector_config.use_mla),
        ("the model's own sparse attention is", selector_config.use_sparse),
        ("bidirectional prefixes are", selector_config.use_mm_prefix),
        ("scales of K and V per head are", selector_config.use_per_head_quant_scales),
        ("non-causal attention is", selector_config.use_non_causal),
        ("reference sliding windows are", selector_config.use_rswa),
        ("batch-invariant kernels (VLLM_BATCH_INVARIANT) are", selector_config.use_batch_invariant),
        ("adaptive verification of drafts is", selector_config.use_adaptive_verification),
    ):
        if wanted:
            reasons.append(f"{feature} not supported: {DENSE}")
    if selector_config.use_kv_connector:
        reasons.append(f"{CONNECTOR}--kv-transfer-config and --kv-offloading-size")
    return reasons
