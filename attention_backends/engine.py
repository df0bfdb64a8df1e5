"""What an engine runs, resolved once: which of our backends, with which options, over which pages.

`PagedEngine.of` reads vLLM's configuration. The platform asks it in the driver, backends and layers in the worker, and
doctor for a model that is not started; so all of them see the same pages.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from vllm.platforms import current_platform

from vllm_sparq.backends import BACKENDS
from vllm_sparq.config import NAMESPACE, Options, check_place, parse_options
from vllm_sparq.formats import QUANTIZED
from vllm_sparq.layout import PageLayout
from vllm_sparq.reads import CUDA_BREAK_EVEN, DIALS, READS, HeadShape, Read, SparseRead
from vllm_sparq.retention import EVICTING, Retention, adds_up_attention

PREFERRED_BLOCK_SIZE = 128
"""Tokens per block where the user sets none: rows of int4 codes are whole cache lines then."""

LONG_BLOCK_SIZE = 256
"""The same where contexts may be long and int4 codes rank them: half as many pages, and rows of two neighbouring lines.
SparQ reads 65,536 tokens 1.1 to 1.3 times as fast."""

LONG_CONTEXT = 32768
"""Tokens from which a context is long: sharing and allocating whole blocks of 256 tokens costs next to nothing then."""

BLOCK_SIZE = "sparq_block_size"
"""Our second key in vLLM's ``additional_config``, written by our platform for models that have windows, chunks or
states too: tokens per page of the full-attention layers. vLLM's own number becomes the smallest of all kinds of layers
once it knows all; or, beside layers with a state, as large as a state."""


LOCAL_KINDS = ("sliding_attention", "chunked_attention")
"""What models call layers that read the newest tokens alone in ``layer_types``; these run on vLLM's own backend."""

DRAFTER = "vllm_sparq.attention_backends.drafting.SelfDrafter"
"""The proposer of `lossless`, as vLLM's ``--speculative-config`` names it."""


@dataclass(frozen=True, kw_only=True)
class PagedEngine:
    """An engine whose full-attention layers run on one of our backends.

    Attributes:
        backend: its name, lower case.
        options: what the user wrote, over what the backend stands for.
        block_size: N, tokens per page: a block of vLLM's, or a part of one beside layers with a state.
    """

    backend: str
    options: Options
    block_size: int

    @classmethod
    def of(cls, vllm_config: Any) -> Self | None:
        """The engine of a configuration; None where no layer runs on a backend of ours.

        Raises:
            OptionsError: what the user wrote cannot be used.
            ValueError: two of our backends at once; they share their options, so one of them would be misled.
        """
        selected = selected_backends(vllm_config)
        if not selected:
            return None
        if len(selected) > 1:
            raise ValueError(
                f"the backends {' and '.join(selected)} are presets of the same options and cannot be mixed: "
                "select one, and set what differs in --additional-config '{\"sparq\": {...}}'"
            )
        check_place(vllm_config.additional_config or {})
        given = (vllm_config.additional_config or {}).get(NAMESPACE, {})
        options = on_platform(_parsed(json.dumps(given, default=repr), selected[0]))
        block_size = (vllm_config.additional_config or {}).get(BLOCK_SIZE, vllm_config.cache_config.block_size)
        return cls(backend=selected[0], options=options, block_size=block_size)

    @property
    def retention(self) -> Retention | None:
        """Which tokens of a request stay; None where all do."""
        return self.options.retained(self.block_size)

    @property
    def quantized(self) -> bool:
        """Whether full blocks hold codes."""
        return self.options.format in QUANTIZED

    @property
    def shares_blocks(self) -> bool:
        """Whether what a block holds follows from the tokens before its end, so that other requests can use it."""
        return self.retention is None and not READS[self.options.read].own_ranking

    @property
    def reads_sparsely(self) -> bool:
        """Whether a decode step chooses what it reads."""
        return issubclass(READS[self.options.read], SparseRead)

    def read(self, heads: HeadShape) -> Read:
        """What a decode step of a layer reads.

        Raises:
            ValueError: an option does not fit the layer.
        """
        return self.options.read_of(heads)

    def layout(self, heads: HeadShape, dtype: torch.dtype) -> PageLayout:
        """The pages of a layer.

        Raises:
            ValueError: pages that cannot be cut so.
        """
        return page_layout(self.options, heads, self.block_size, dtype)


def selected_backends(vllm_config: Any) -> list[str]:
    """Names of ours that any layer of this engine may be given to, lower case, each once."""
    attention = vllm_config.attention_config
    names = [getattr(backend, "name", None) for backend in (attention.backend, *attention.backend_per_kind.values())]
    return sorted({name.lower() for name in names if name in BACKENDS})


@functools.lru_cache(maxsize=16)
def _parsed(given: str, backend: str) -> Options:
    """Options are parsed once per process and text, however often an engine is asked for."""
    return parse_options({NAMESPACE: json.loads(given)}, backend)


def on_platform(options: Options) -> Options:
    """Options in which nothing is left to the platform that this process runs on."""
    if options.dense_below != "auto" or not current_platform.is_cuda():
        return options
    return options.model_copy(update={"dense_below": CUDA_BREAK_EVEN})


def heads_of(model_config: Any, parallel_config: Any) -> HeadShape:
    """The heads of a worker's attention layers: a rank of tensor parallelism has its share."""
    return HeadShape(
        head_size=model_config.get_head_size(),
        n_heads=model_config.get_num_attention_heads(parallel_config),
        n_kv_heads=model_config.get_num_kv_heads(parallel_config),
    )


def preferred_block_size(options: Options, max_model_len: int) -> int:
    """Tokens per block where the user sets none.

    Not longer where blocks are quantized or evicted from: what waits for quantization, and what a budget must hold,
    grows with the block.
    """
    pays = READS[options.read].prefers_long_blocks(options) and options.retention not in EVICTING
    return LONG_BLOCK_SIZE if pays and max_model_len >= LONG_CONTEXT else PREFERRED_BLOCK_SIZE


def page_layout(options: Options, heads: HeadShape, block_size: int, dtype: torch.dtype) -> PageLayout:
    """The pages that these options need for layers of one shape.

    Raises:
        ValueError: pages that cannot be cut so.
    """
    needs = READS[options.read].needs(options, grouped=heads.grouped)
    return PageLayout(
        head_size=heads.head_size,
        block_size=block_size,
        dtype=dtype,
        format=options.format,
        group_size=options.group_size,
        ranking=needs.ranking,
        value_sum=needs.value_sum,
        positions=options.retention in EVICTING,
        attention=adds_up_attention(options.retention),
    )


def rebind_refusal(options: Options, other: Options, *, grouped: bool) -> str | None:
    """Why layers that run with ``options`` cannot go on with ``other`` over the cache they have; None if they can.

    ``grouped``: several query heads per KV head, where some dials put other parts into a page.
    """
    before, after = options.model_dump(), other.model_dump()
    changed = [name for name in before if before[name] != after[name]]
    fixed = [f"{name}={after[name]!r}" for name in changed if name not in DIALS]
    if fixed:
        return f"{', '.join(fixed)}: not an option that a running engine can change; start an engine with it"
    has, needs = (READS[chosen.read].needs(chosen, grouped=grouped) for chosen in (options, other))
    if has == needs:
        return None
    chosen = ", ".join(f"{name}={after[name]!r}" for name in changed)
    parts = [f"{f.name} {getattr(needs, f.name)!r} (here: {getattr(has, f.name)!r})" for f in fields(needs)]
    return f"{chosen} needs pages with {' and '.join(parts)}; start an engine with it"
