"""vLLM's built-in platforms, honouring our backends: chosen per layer, checked before the model loads."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_sparq import compat, counters
from vllm_sparq.backends import BACKENDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.sparq")

EVICTING = tuple(f"vllm_sparq.scheduler.scheduler.{name}EvictingScheduler" for name in ("", "Async"))
PROMPT_CACHING = tuple(f"vllm_sparq.scheduler.prompts.{name}PromptCachingScheduler" for name in ("", "Async"))
"""Our schedulers: in step with the workers, and ahead of them (vLLM's asynchronous scheduling)."""

DRAFTING = ("vllm_sparq.scheduler.drafting.DraftingScheduler",)
"""The same for `lossless`, in step alone: vLLM schedules no proposer of a user's own ahead."""


IN_PAGES = ("vllm_sparq.scheduler.drafting.DraftsInPagesScheduler",)
"""The same for drafts over quantized pages; vLLM schedules none of the methods ahead that can be used there."""


class SparqPlatformMixin:
    """What both platforms add to vLLM's own."""

    serves_sparq = True
    sparq_workers: ClassVar[dict[str, str]] = {}
    """vLLM's worker class -> ours."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None, **kwargs: Any
    ) -> str:
        """The backend of one layer: ours where it was selected and can serve the layer, else vLLM's or an error.

        Raises:
            ValueError: the layer cannot be served and there is no agreed substitute; the message lists the reasons.
        """
        if getattr(selected_backend, "name", None) not in BACKENDS:
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads, **kwargs)  # type: ignore[misc,no-any-return]
        name = selected_backend.name
        if attn_selector_config.has_sliding_window:
            # A window, or a chunk (`chunks.py`), bounds what the layer reads already: there is nothing for us to save.
            substitute = super().get_attn_backend_cls(None, attn_selector_config, num_heads, **kwargs)  # type: ignore[misc]
            logger.info_once("layers of windows or chunks run on %s, full-attention layers on %s", substitute, name)
            return str(substitute)
        from vllm_sparq.attention_backends.refusals import CANNOT_START, layer_refusals

        refusals = layer_refusals(attn_selector_config)
        if refusals:
            raise ValueError(
                f"{CANNOT_START}--attention-backend {name.lower()} cannot serve this model: {'; '.join(refusals)}"
            )
        return BACKENDS[name]

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check options and features in the driver, where the message reaches the user; runs in the engine core too.

        Raises:
            ValueError: options or features that cannot work, with value, rule and remedy of each.
        """
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        from vllm_sparq.attention_backends.admission import check_all_requests
        from vllm_sparq.attention_backends.engine import selected_backends
        from vllm_sparq.attention_backends.refusals import CANNOT_START, engine_refusals, worker_refusals

        if not selected_backends(vllm_config):
            return
        check_all_requests()
        cls._choose_block_size(vllm_config)
        parallel = vllm_config.parallel_config
        parallel.worker_cls = cls.sparq_workers.get(parallel.worker_cls, parallel.worker_cls)
        refusals = engine_refusals(vllm_config)
        (ours,) = cls.sparq_workers.values()
        if parallel.worker_cls != ours:
            refusals += worker_refusals(parallel.worker_cls, ours)
        if refusals:
            raise ValueError(CANNOT_START + "; ".join(refusals))
        counters.name_run(vllm_config)
        cls._arrange_sharing(vllm_config)
        cls._arrange_drafts(vllm_config)
        cls._choose_scheduler(vllm_config)

    @classmethod
    def _choose_block_size(cls, vllm_config: VllmConfig) -> None:
        """The block size where the user sets none.

        vLLM asks backends for the size that they prefer only after this check, or (0.32 on CPU) not at all; until then
        it may be one that the options rule out.
        """
        from vllm_sparq.attention_backends.engine import BLOCK_SIZE, LOCAL_KINDS, PagedEngine, preferred_block_size
        from vllm_sparq.attention_backends.shared_pages import preferred_with_windows

        model, cache = vllm_config.model_config, vllm_config.cache_config
        if model is None or model.use_mla:
            return
        with contextlib.suppress(ValueError):  # options that cannot be used are refused in a moment
            engine = PagedEngine.of(vllm_config)
            assert engine is not None
            if not cache.user_specified_block_size:
                shared = preferred_with_windows(vllm_config, engine, partial(cls._window_backend, vllm_config))
                cache.block_size = shared or preferred_block_size(engine.options, model.max_model_len)
        kinds = getattr(model.hf_text_config, "layer_types", None) or ()
        if model.is_hybrid or model.attention_chunk_size or not set(kinds).isdisjoint(LOCAL_KINDS):
            given: Any = vllm_config.additional_config or {}
            vllm_config.additional_config = {**given, BLOCK_SIZE: cache.block_size}

    @classmethod
    def _window_backend(cls, vllm_config: VllmConfig, head_size: int) -> Any:
        """What vLLM runs sliding-window layers on."""
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.attention.selector import AttentionSelectorConfig

        dtype: Any = vllm_config.model_config.dtype
        layer = AttentionSelectorConfig(head_size, dtype, None, None, has_sliding_window=True)
        return resolve_obj_by_qualname(super().get_attn_backend_cls(None, layer))  # type: ignore[misc]

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        """As vLLM does, but the block size that we have chosen stays.

        Where backends are mixed, vLLM takes the smallest size that all of them take, for all layers. Beside layers with
        a state it asks what a token takes, of a backend that must know the engine to tell, and makes blocks as large as
        a state: of whole pages of ours (`PagedSpec`).
        """
        from vllm.config import set_current_vllm_config

        from vllm_sparq.attention_backends.engine import selected_backends

        chosen = vllm_config.cache_config.block_size
        with set_current_vllm_config(vllm_config):
            super().update_block_size_for_backend(vllm_config)  # type: ignore[misc]
        model = vllm_config.model_config
        if model is not None and selected_backends(vllm_config) and not model.is_hybrid:
            vllm_config.cache_config.block_size = chosen

    @classmethod
    def _arrange_sharing(cls, vllm_config: VllmConfig) -> None:
        """No block is shared where what it holds is a request's own.

        vLLM's configuration does not say whether prefix caching is its default or was asked for, so it is switched off
        with a warning either way.
        """
        from vllm_sparq.attention_backends.engine import PagedEngine

        engine = PagedEngine.of(vllm_config)
        if engine is None or engine.shares_blocks or not vllm_config.cache_config.enable_prefix_caching:
            return
        vllm_config.cache_config.enable_prefix_caching = False
        what = "holds after an eviction" if engine.retention is not None else "says of its tokens' rank"
        logger.warning_once(
            "prefix caching is off: what a block %s depends on the whole request, so no other request can use it", what
        )

    @classmethod
    def _arrange_drafts(cls, vllm_config: VllmConfig) -> None:
        """With ``lossless``, speculative decoding by the model itself, in vLLM's own words.

        A drafting head over quantized blocks is quantized too: vLLM would give it blocks of full precision, as large as
        which it then makes all others.
        """
        from vllm.config import SpeculativeConfig

        from vllm_sparq.attention_backends.engine import DRAFTER, PagedEngine
        from vllm_sparq.attention_backends.speculation import HEADS

        engine, speculative = PagedEngine.of(vllm_config), vllm_config.speculative_config
        if engine is not None and engine.quantized and speculative is not None and speculative.method in HEADS:
            speculative.attention_backend = speculative.attention_backend or vllm_config.attention_config.backend
        if engine is None or not engine.options.lossless or speculative is not None:
            return
        vllm_config.speculative_config = SpeculativeConfig(
            method="custom_class",
            model=DRAFTER,
            num_speculative_tokens=engine.options.drafts,
            target_model_config=vllm_config.model_config,
            target_parallel_config=vllm_config.parallel_config,
        )

    @classmethod
    def _choose_scheduler(cls, vllm_config: VllmConfig) -> None:
        """One of ours, where vLLM's own would evict by preempting or take decoded tokens for a prompt's.

        Raises:
            ValueError: the user has named another.
        """
        from vllm_sparq.attention_backends.engine import PagedEngine

        engine = PagedEngine.of(vllm_config)
        assert engine is not None
        options, scheduler = engine.options, vllm_config.scheduler_config
        ours: tuple[str, ...]
        optional = False
        drafts = engine.quantized and vllm_config.speculative_config is not None
        if options.lossless:
            ours, why = DRAFTING, "lossless=True needs our scheduler"
        elif options.pressure == "evict":
            ours, why = EVICTING, "pressure='evict' is the work of our scheduler"
        elif options.retention != "all":
            ours, why = PROMPT_CACHING, f"retention={options.retention!r} needs our scheduler"
        elif engine.reads_sparsely:
            ours, why, optional = PROMPT_CACHING, "sharing='prompts' is the work of our scheduler", not drafts
        elif drafts:
            ours, why = IN_PAGES, f"speculative decoding over format={options.format!r} needs our scheduler"
        else:
            return
        theirs = scheduler.scheduler_cls
        if theirs is None:
            scheduler.scheduler_cls = ours[-1 if scheduler.async_scheduling else 0]
            return
        fitting = (*PROMPT_CACHING, *EVICTING) if ours is PROMPT_CACHING else ours
        if theirs not in fitting and not (optional and options.sharing == "all"):
            remedy = ", or set sharing to 'all'" if optional else ""
            raise ValueError(
                f"vllm-sparq cannot start: {why}, and --scheduler-cls names {theirs}: leave it out{remedy}"
            )


class SparqCpuPlatform(SparqPlatformMixin, CpuPlatform):
    """vLLM on CPU, honouring our backends."""

    sparq_workers: ClassVar[dict[str, str]] = {
        compat.CPU_WORKER: "vllm_sparq.attention_backends.cpu_worker.SparqCpuWorker"
    }


def __getattr__(name: str) -> Any:
    """`SparqCudaPlatform`, made when asked for: importing vLLM's CUDA platform needs CUDA."""
    if name != "SparqCudaPlatform":
        raise AttributeError(name)
    from vllm.platforms.cuda import CudaPlatform

    return type(
        "SparqCudaPlatform",
        (SparqPlatformMixin, CudaPlatform),
        {
            "__doc__": "vLLM on CUDA, honouring our backends.",
            "__module__": __name__,
            "sparq_workers": {compat.CUDA_WORKER: "vllm_sparq.attention_backends.cuda_worker.SparqCudaWorker"},
        },
    )
