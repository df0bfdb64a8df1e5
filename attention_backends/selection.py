"""Which of our backends an engine runs, with which options, and the pages that these need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vllm_sparq.config import Options, parse_options
from vllm_sparq.layout import PageLayout
from vllm_sparq.plugin import BACKENDS

PREFERRED_BLOCK_SIZE = 128
"""Tokens per block where the user sets none: rows of int4 codes are whole cache lines then."""

LONG_BLOCK_SIZE = 256
"""The same where contexts may be long and int4 codes rank them: half as many pages, and rows of two neighbouring lines.
SparQ reads 65,536 tokens 1.1 to 1.3 times as fast."""

LONG_CONTEXT = 32768
"""Tokens from which a context is long: sharing and allocating whole blocks of 256 tokens costs next to nothing then."""


def selected_backends(vllm_config: Any) -> list[str]:
    """Names of ours that any layer of this engine may be given to, lower case, each once."""
    attention = vllm_config.attention_config
    names = [getattr(backend, "name", None) for backend in (attention.backend, *attention.backend_per_kind.values())]
    return sorted({name.lower() for name in names if name in BACKENDS})


def engine_options(vllm_config: Any) -> Options:
    """The options of an engine whose layers run on one of our backends.

    Raises:
        OptionsError: what the user wrote cannot be used.
        ValueError: two of our backends at once; they share their options, so one of them would be misled.
    """
    selected = selected_backends(vllm_config)
    if len(selected) > 1:
        raise ValueError(
            f"the backends {' and '.join(selected)} are presets of the same options and cannot be mixed: "
            "select one, and set what differs in --additional-config '{\"sparq\": {...}}'"
        )
    return parse_options(vllm_config.additional_config, *selected)


def preferred_block_size(options: Options, max_model_len: int) -> int:
    """Tokens per block where the user sets none.

    Not longer where blocks are quantized or evicted from: what waits for quantization, and what a budget must hold,
    grows with the block.
    """
    ranks_by_rows = options.read == "sparq" and options.ranking == "int4" and options.format == "model"
    is_long = ranks_by_rows and options.retention == "all" and max_model_len >= LONG_CONTEXT
    return LONG_BLOCK_SIZE if is_long else PREFERRED_BLOCK_SIZE


def page_layout(options: Options, head_size: int, block_size: int, dtype: torch.dtype, *, grouped: bool) -> PageLayout:
    """The pages that these options need for layers of one shape; ``grouped``: several query heads per KV head.

    Raises:
        ValueError: pages that cannot be cut so.
    """
    layout = PageLayout(
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        format=options.format,
        group_size=options.group_size,
    )
    ranks_tokens = options.read == "sparq"
    ranking = options.ranking if ranks_tokens and not layout.channel_keys else None
    return replace(
        layout,
        ranking="bounds" if options.read == "spans" else ranking,
        value_sum=ranks_tokens and options.reallocates(grouped=grouped),
        positions=options.retention != "all",
        scores=options.retention == "heavy_hitter",
    )
