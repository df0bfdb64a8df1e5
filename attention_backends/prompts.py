"""The attention of prompts in one layer: through FlashAttention where it serves them, else through our own kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.flash import flash_choice, flash_prefill, restored_cache
from vllm_sparq.attention_backends.steps.restored import room_to_restore
from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.layout import Pages
from vllm_sparq.ops import restore
from vllm_sparq.ops.dispatch import OVERRIDE, Choice
from vllm_sparq.reads import HeadShape
from vllm_sparq.retention import adds_up_attention


class PromptAttention:
    """What the rows of prompts run.

    Attributes:
        choice: the implementation, for reports.
        own: our kernel; None where FlashAttention does it all.
        room: tokens that a call may restore from codes for FlashAttention; 0 where it is not asked to read any.
    """

    def __init__(
        self,
        vllm_config: Any,
        engine: PagedEngine,
        heads: HeadShape,
        own: Choice,
        *,
        sinks: torch.Tensor | None,
        soft_cap: float | None,
    ) -> None:
        dtype = vllm_config.model_config.dtype
        flash = flash_choice(
            dtype=dtype,
            head_size=heads.head_size,
            format=engine.options.format,
            tracked=adds_up_attention(engine.options.retention),
            forced=os.environ.get(OVERRIDE),
            sinks=sinks,
            soft_cap=soft_cap,
        )
        self.choice = own if flash is None else flash
        self.own: Callable[..., None] | None = own.load() if flash is None or engine.quantized else None
        self.room = 0
        if flash is not None and engine.quantized:
            token_bytes = 2 * heads.n_kv_heads * heads.head_size * dtype.itemsize
            self.room = room_to_restore(vllm_config, engine.block_size, token_bytes)
        numbers = self.room * heads.n_kv_heads * heads.head_size
        self._taken = ((numbers,), dtype), ((numbers,), dtype)
        self._restore = restore.implementation(vllm_config.device_config.device_type)
        self._sinks = sinks  # in the type of the model, as FlashAttention takes them

    def take_room(self) -> list[torch.Tensor]:
        """For K and for V, until another layer takes it: vLLM keeps one such workspace for all, and lets nobody ask for
        more than the run in which it measures memory, which has no cache, has asked for."""
        return current_workspace_manager().get_simultaneous(*self._taken) if self.room else []

    def run(
        self,
        rows: PrefillRows,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor],
        pages: Pages,
        output: torch.Tensor,
        *,
        scale: float,
        **softmax: Any,
    ) -> None:
        """The rows of prompts, whose new tokens are in the pages by now, unless they are staged.

        Args:
            query, output: [T, H, D], of the whole step.
            new: K and V [T', G, D], as the prefill op takes them.
            softmax: what ops are told of it.
        """
        how = {"scale": scale, "out": output, **softmax, "sinks": self._sinks}
        if self.own is None:
            flash_prefill(query, pages.keys.transpose(1, 2), pages.values.transpose(1, 2), rows, **how)
        elif rows.restores is not None:
            for plan in rows.restores:
                cache = restored_cache(plan, pages, *new, self.take_room(), self._restore)
                flash_prefill(query, *cache, plan, **how)
        else:
            tables = rows.block_table, rows.query_start_loc, rows.context_lens
            self.own(query, *new, pages, *tables, scale=scale, out=output, key_start_loc=rows.key_start_loc, **softmax)

    def warm_up(self, pages: Pages, n_heads: int, width: int, **softmax: Any) -> None:
        """Launch the variants of our Triton kernels, over block tables of ``width`` columns."""
        from vllm_sparq.ops import warm_up

        if self.own is not None:
            warm_up.warm_prefills(partial(self.own, **softmax), pages, n_heads, width)
        if self.room:
            warm_up.warm_restores(pages, width)
