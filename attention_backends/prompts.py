"""The attention of prompts in one layer: through FlashAttention where it serves them, else through our own kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_sparq.attention_backends.flash import RestoredCache, flash_choice, flash_prefill
from vllm_sparq.attention_backends.steps.restored import restored_tokens
from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.config import Options
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dispatch import OVERRIDE, Choice
from vllm_sparq.reads import HeadShape
from vllm_sparq.retention import RETENTIONS


class PromptAttention:
    """What the rows of prompts run.

    Attributes:
        choice: the implementation, for reports.
        own: our kernel; None where FlashAttention does it all.
        restored: room for blocks that are restored for FlashAttention; None where there are no codes, or it reads none.
    """

    def __init__(
        self,
        vllm_config: Any,
        options: Options,
        heads: HeadShape,
        own: Choice,
        *,
        sinks: torch.Tensor | None,
        soft_cap: float | None,
    ) -> None:
        dtype, policy = vllm_config.model_config.dtype, RETENTIONS[options.retention]
        flash = flash_choice(
            dtype=dtype,
            head_size=heads.head_size,
            format=options.format,
            tracked=policy is not None and policy.rank == "attention",
            forced=os.environ.get(OVERRIDE),
            sinks=sinks,
            soft_cap=soft_cap,
        )
        self.choice = own if flash is None else flash
        self.own: Callable[..., None] | None = None
        self.restored: RestoredCache | None = None
        if flash is None or options.format != "model":
            self.own = own.load()
        if flash is not None and options.format != "model":
            shape = heads.n_kv_heads, heads.head_size
            n_tokens = restored_tokens(vllm_config, 2 * shape[0] * shape[1] * dtype.itemsize)
            self.restored = RestoredCache(n_tokens, *shape, dtype, vllm_config.device_config.device)
        self._sinks = sinks  # in the type of the model, as FlashAttention takes them

    @property
    def restored_tokens(self) -> int:
        """That a call may restore from codes; 0 where prompts do not go that way."""
        return 0 if self.restored is None else self.restored.n_tokens

    def profile(self) -> None:
        """Take, for a moment, the memory that a step may: vLLM measures what runs without a cache need."""
        if self.restored is not None:
            self.restored.empty()

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
        elif rows.restored is not None and self.restored is not None:
            for part in rows.restored:
                flash_prefill(query, *self.restored.of(part, pages, *new), part, **how)
        else:
            tables = rows.block_table, rows.query_start_loc, rows.context_lens
            self.own(query, *new, pages, *tables, scale=scale, out=output, key_start_loc=rows.key_start_loc, **softmax)

    def warm_up(self, pages: Pages, n_heads: int, width: int, **softmax: Any) -> None:
        """Launch the variants of our Triton kernels, over block tables of ``width`` columns."""
        from vllm_sparq.ops import warm_up

        if self.own is not None:
            warm_up.warm_prefills(partial(self.own, **softmax), pages, n_heads, width)
        if self.restored is not None:
            warm_up.warm_restores(pages, width)
