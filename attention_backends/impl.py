"""One attention layer: write the new tokens, attend densely for prompts, by the read policy for decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_sparq.attention_backends.engine import PagedEngine, on_platform, page_layout, rebind_refusal
from vllm_sparq.attention_backends.keys import LEAST_TOKENS, MOST_MOVED, attention_moved, is_fragile, moved_warning
from vllm_sparq.attention_backends.positions import Turning
from vllm_sparq.attention_backends.prompts import PromptAttention
from vllm_sparq.attention_backends.refusals import ALIBI, CANNOT_START, DENSE
from vllm_sparq.attention_backends.shared_pages import pages_of
from vllm_sparq.attention_backends.steps.evicting import EvictingMetadata
from vllm_sparq.attention_backends.steps.policies import PolicyRows
from vllm_sparq.attention_backends.steps.requests import StepRequests
from vllm_sparq.attention_backends.steps.rows import PagedMetadata, PrefillRows
from vllm_sparq.config import Options
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import Pages
from vllm_sparq.ops import represent, turned_attention
from vllm_sparq.ops.dispatch import Choice, choose
from vllm_sparq.reads import READS, HeadShape, Read
from vllm_sparq.rotation import prepare_rotation, rotated, turned_back

logger = init_logger("vllm.sparq")


class PagedImpl(AttentionImpl[PagedMetadata | EvictingMetadata]):
    """Built by vLLM for every full-attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError(CANNOT_START + ALIBI)
        vllm_config: Any = get_current_vllm_config()
        self._source = _source_of(vllm_config, kv_sharing_target_layer_name)
        self._is_read_by_others = False  # until one of them is built
        self._brought: tuple[torch.Tensor, torch.Tensor] | None = None  # by the last step, for those
        engine = PagedEngine.of(vllm_config)
        assert engine is not None
        self._options = engine.options
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self._heads = HeadShape(head_size=head_size, n_heads=num_heads, n_kv_heads=self.num_kv_heads)
        self.kv_cache_dtype = kv_cache_dtype
        self.requests: StepRequests | None = None  # our worker's, once the model is loaded
        self.turning: Turning | None = None  # the same, where the first tokens are seen where they are not
        self._sinks, self._softmax = sinks, dict[str, Any]()  # the sinks are there once weights are loaded
        if logits_soft_cap:
            self._softmax["soft_cap"] = float(logits_soft_cap)
        stored = FORMATS[self._options.format]
        self._rotates = stored is not None and stored.rotated
        if self._rotates:
            prepare_rotation(head_size, vllm_config.model_config.dtype, vllm_config.device_config.device)
        self._choices = _choose_ops(vllm_config.device_config.device_type, READS[self._options.read])
        own = self._choices["prefill"]
        self.prompts = PromptAttention(vllm_config, engine, self._heads, own, sinks=sinks, soft_cap=logits_soft_cap)
        self._choices["prefill"] = self.prompts.choice
        warning = slow_ops(self._choices)
        if warning:
            logger.warning_once(warning)
        self._write = self._choices["write"].load()
        self._evict = self._choices["evict"].load()
        self._represent = represent.implementation() if READS[self._options.read].own_ranking else None
        self._dense = self._choices["dense_decode"].load()
        self._index = 0  # this, and what reads decodes, is known with the layer's name, at its first step
        self._decode: Callable[..., None] | None = None
        self._pages: Pages | None = None
        self._bound: tuple[int, ...] = ()  # where these are
        self.room = 0  # of a page, where that is more than it needs; our worker's, once it is known what shares pages
        self._looks_at_keys = False
        self._dtype: torch.dtype = vllm_config.model_config.dtype

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM calls it when the model's weights are there, or there anew: what the ops are told of the softmax."""
        if self._sinks is not None:
            self._softmax["sinks"] = self._sinks.detach().float().contiguous()

    @property
    def options(self) -> Options:
        """What this layer runs with; `rebind` changes it."""
        return self._options

    def rebind(self, options: Options) -> None:
        """Read as other options say, from the next step on and over the pages that are there.

        Raises:
            ValueError: they need other pages, or concern more than what is read.
        """
        options = on_platform(options)
        refusal = rebind_refusal(self._options, options, grouped=self._heads.grouped)
        if refusal is not None:
            raise ValueError(refusal)
        options.read_of(self._heads)  # refused now where they do not fit the layer
        self._options, self._pages = options, None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: PagedMetadata | EvictingMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query and output [T, H, D], key and value [T, G, D]; rows after the step's tokens are padding.

        Key and value are None, or mean nothing, in a layer that reads the cache of another.
        """
        if attn_metadata is None:  # a profiling run, without a cache
            self.prompts.take_room()
            return output.fill_(0)
        pages = self._bind(layer, kv_cache, query.dtype)
        if not self._rotates:
            return self._run(attn_metadata, query, key, value, pages, output)
        stored = None if value is None or self._source is not None else rotated(value)
        return output.copy_(turned_back(self._run(attn_metadata, query, key, stored, pages, output)))

    def _run(
        self,
        attn_metadata: PagedMetadata | EvictingMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        pages: Pages,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """`forward` over V as pages hold it, which is how the output is left."""
        if isinstance(attn_metadata, PagedMetadata):
            self._attend(attn_metadata, query, key, value, pages, output)
            return output
        assert key is not None  # eviction is refused where caches are shared
        assert value is not None
        for turn in attn_metadata.turns:
            if turn.eviction is not None:
                eviction = turn.eviction
                lens = eviction.seq_lens, eviction.kept_lens, eviction.recent_from
                how = dict(sinks=eviction.sinks, rank=eviction.rank, most_kept=eviction.most_kept)
                self._evict(pages, eviction.block_table, *lens, **how)
            if turn.rows is None:
                self._attend(turn.step, query, key, value, pages, output)
                continue
            turn_output = torch.empty_like(output[: len(turn.rows)])
            self._attend(turn.step, query[turn.rows], key[turn.rows], value[turn.rows], pages, turn_output)
            output[turn.rows] = turn_output
        return output

    def _attend(
        self,
        step: PagedMetadata,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        pages: Pages,
        output: torch.Tensor,
    ) -> None:
        """Write the step's tokens into their pages, and let its rows see what they may."""
        if step.prefill is not None and self._looks_at_keys and key is not None:
            self._look_at_keys(step.prefill, query, key, pages)
        new = self._bring(step, key, value, pages)
        if self.turning is not None:
            turned = self.turning.of(query, step)
            rows, tables = len(turned), (step.block_table, step.query_start_loc, step.seq_lens)
            attend = turned_attention.implementation()
            attend(query[:rows], turned, pages, *tables, scale=self.scale, out=output[:rows], **self._softmax)
            return
        if self._represent is not None and self._source is None:
            self._represent(query, pages, step.block_table, step.query_start_loc, step.seq_lens)
        if step.prefill is not None:
            self.prompts.run(step.prefill, query, new, pages, output, scale=self.scale, **self._softmax)
        n = step.n_decodes
        if n:
            self._read(query[:n], pages, step.groups, output[:n], dense=step.dense)
        if step.replayed is not None:
            replayed = step.replayed
            out, seen = torch.empty_like(output[: len(replayed.rows)]), replayed.pages_seen(pages, *new)
            self._read(query[replayed.rows], seen, replayed.groups, out, dense=step.dense)
            output[replayed.rows] = out

    def _read(
        self, query: torch.Tensor, pages: Pages, groups: tuple[PolicyRows, ...], out: torch.Tensor, *, dense: bool
    ) -> None:
        """Rows of decodes [n, H, D], each group by the options of its requests; ``dense``: all of them in full."""
        for group in groups:
            decode = self._decode if group.options is None else self._read_policy(group.options)
            if dense:
                decode = self._dense
            assert decode is not None
            tables = group.block_table, group.seq_lens
            if group.rows is None:
                decode(query, pages, *tables, scale=self.scale, out=out, **self._softmax)
                continue
            found = torch.empty_like(out[: len(group.rows)])
            decode(query[group.rows], pages, *tables, scale=self.scale, out=found, **self._softmax)
            out[group.rows] = found

    def _bring(
        self, step: PagedMetadata, key: torch.Tensor | None, value: torch.Tensor | None, pages: Pages
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as the rows of prompts take them, [T', G, D] each, once the step's tokens are in their pages."""
        if self._source is not None:
            assert self._source._brought is not None
            return self._source._brought
        assert key is not None
        assert value is not None
        rows = step.prefill
        new = key, value
        if rows is not None and rows.begun is not None:  # before the write, which quantizes what is staged
            new = rows.begun.with_new(pages, key, value)
        tables = step.block_table, step.query_start_loc, step.seq_lens
        self._write(key, value, pages, *tables, step.first_positions)
        self._brought = new if self._is_read_by_others else None
        return new

    def look_at_next_keys(self) -> None:
        """Of the next prompt, where codes may spoil them; what vLLM warms up with is none."""
        self._looks_at_keys = is_fragile(self._options)

    def _look_at_keys(self, rows: PrefillRows, query: torch.Tensor, key: torch.Tensor, pages: Pages) -> None:
        """Say so, once, where codes would spoil attention: of the first prompt that is long enough.

        Which rows these are the host knows: asking the device would stop it in each layer until such a prompt comes.
        """
        assert rows.longest is not None  # whose pages are quantized
        start, stop = rows.longest
        if self._source is not None or stop - start < LEAST_TOKENS:
            return
        self._looks_at_keys = False
        if attention_moved(query[start:stop], key[start:stop], pages.layout, self.scale) > MOST_MOVED:
            logger.warning_once(moved_warning(self._options.format))

    def warm_up(self, layer: Any, widths: list[int]) -> None:
        """Launch, over requests without tokens, every variant of our Triton kernels that a step may need.

        Block tables are so many blocks wide: those of steps of answers, where tokens are evicted, less than others.
        """
        if not any(choice.implementation == "triton" for choice in self._choices.values()):
            return
        from vllm_sparq.ops import warm_up

        if not warm_up.IS_COMPILED:
            return
        pages = self._bind(layer, layer.kv_cache, self._dtype)
        assert self._decode is not None
        for width in widths:
            for decode in {self._dense, self._decode}:
                warm_up.warm_decodes(partial(decode, **self._softmax), pages, self.num_heads, width)
        warm_up.warm_writes(self._write, pages, widths[0])
        self.prompts.warm_up(pages, self.num_heads, widths[0], **self._softmax)
        if pages.layout.positions:
            warm_up.warm_evictions(self._evict, pages, widths[0])

    def write_step(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedMetadata | EvictingMetadata,
    ) -> None:
        """Write a step's tokens, evict nothing, attend to nothing: for a benchmark of the rest of the engine."""
        if self._source is not None:
            return
        pages = self._bind(layer, kv_cache, key.dtype)
        value = rotated(value) if self._rotates else value
        if isinstance(attn_metadata, PagedMetadata):
            steps: list[tuple[PagedMetadata, Any]] = [(attn_metadata, slice(None))]
        else:
            steps = [(turn.step, slice(None) if turn.rows is None else turn.rows) for turn in attn_metadata.turns]
        for step, rows in steps:
            tables = step.block_table, step.query_start_loc, step.seq_lens
            self._write(key[rows], value[rows], pages, *tables, step.first_positions)

    def _bind(self, layer: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> Pages:
        """The layer's cache as pages; remembered until vLLM hands over another one."""
        pages = self._pages
        if pages is None or self._bound != _address(kv_cache):
            room = (self._source or self).room
            layout = replace(page_layout(self._options, self._heads, kv_cache.shape[2], dtype), room=room)
            pages = self._pages = pages_of(kv_cache, layout)
            self._bound = _address(kv_cache)
            self._index = _layer_index(layer.layer_name)
            self._decode = self._read_policy(self._options)
        return pages

    def forget_pages(self) -> None:
        """Keep nothing of the cache alive; the next step binds what vLLM hands over then."""
        self._pages = None

    def _read_policy(self, options: Options) -> Callable[..., None]:
        """What reads a decode row of this layer under these options."""
        if self._index < options.dense_layers:
            return self._dense
        read = resolved(options, self._heads)
        return partial(self._choices[read.op].load(), **read.arguments)

    def describe(self) -> dict[str, Any]:
        """What this layer runs, for reports; plain types only."""
        return {
            "ops": {name: f"{choice.implementation} ({choice.reason})" for name, choice in self._choices.items()},
            "options": self._options.model_dump(),
        }


@functools.lru_cache(maxsize=1024)
def resolved(options: Options, heads: HeadShape) -> Read:
    """`Options.read_of`, which layers ask in each step in which requests have chosen for themselves."""
    return options.read_of(heads)


def _source_of(vllm_config: Any, layer_name: str | None) -> PagedImpl | None:
    """The layer whose cache a new one reads, which writes nothing itself, or None.

    Raises:
        NotImplementedError: its pages are not ours.
    """
    if layer_name is None:
        return None
    source = vllm_config.compilation_config.static_forward_context[layer_name].impl
    if not isinstance(source, PagedImpl):
        raise NotImplementedError(
            f"{CANNOT_START}a layer shares the KV cache of {layer_name}, which runs on another backend: {DENSE}"
        )
    source._is_read_by_others = True
    return source


def _choose_ops(device_type: str, read: type[Read]) -> dict[str, Choice]:
    """The implementation of every op that layers of one read may call."""
    return {name: choose(name, device_type) for name in ("write", "prefill", "dense_decode", read.op, "evict")}


def slow_ops(choices: dict[str, Choice]) -> str | None:
    """What to tell a user whose ops run on the reference, which is a specification and not meant to be fast."""
    reasons = {choice.reason for choice in choices.values() if choice.implementation == "reference"}
    return f"sparq attention will be slow: {'; '.join(sorted(reasons))}" if reasons else None


def _address(cache: torch.Tensor) -> tuple[int, ...]:
    """Where a cache is, and how many pages and KV heads it has; another one may begin where an earlier one did."""
    return cache.data_ptr(), *cache.shape[:2], *cache.stride()[:2]


def _layer_index(layer_name: str) -> int:
    """The number in a layer's name, `model.layers.7.self_attn.attn`."""
    return next(int(part) for part in layer_name.split(".") if part.isdigit())
