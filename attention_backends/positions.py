"""Positions beyond training: how far away the first tokens of a request seem once others have been evicted.

A window keeps the first tokens and the newest. The newest are where they were; the first drift away, farther than the
model was trained for. Two ways out, both by turning the query that looks at them (`turned_attention`):

    renumbered   positions are counted in the cache: the first tokens come right before the newest (StreamingLLM)
    capped       no token is seen farther away than a context of training is long (LM-Infinite)

Angles follow from the model's own rotary embedding: `rope_of` takes the kinds whose angles grow with the position
alone, and looks whether the model's table of cosines and sines says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.linear_scaling_rope import LinearScalingRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding
from vllm.platforms import current_platform

from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.steps.rows import PagedMetadata

KNOWN_ROPES = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_type`` whose angles are a number of each channel times the position."""

OTHERS = ("mrope_section", "use_fope")
"""Keys of rope parameters that make another embedding of them."""

REMEDY = "set positions 'original'"


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        frequencies: fp64 [R/2], radians per position of each pair of channels; R channels of a head are rotated.
        neox: whether a pair is channels i and i + R/2; else 2i and 2i + 1.
    """

    frequencies: torch.Tensor
    neox: bool

    def turned_back(self, query: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """fp32 [T, n, H, D]: queries [T, H, D] as they would be ``by`` (int [T, n]) positions before theirs."""
        angles = -by[..., None, None].double() * self.frequencies  # [T, n, 1, R/2]
        cos, sin = angles.cos().float(), angles.sin().float()
        n_rotated = 2 * len(self.frequencies)
        query = query[:, None].float()
        rotated, rest = query[..., :n_rotated], query[..., n_rotated:]
        pairs = rotated.unflatten(-1, (2, -1)) if self.neox else rotated.unflatten(-1, (-1, 2)).transpose(-1, -2)
        one, other = pairs.unbind(-2)
        found = torch.stack([one * cos - other * sin, other * cos + one * sin], -2)  # [T, n, H, 2, R/2]
        found = found if self.neox else found.transpose(-1, -2)
        return torch.cat([found.flatten(-2), rest.expand(*by.shape, *rest.shape[2:])], -1)


@dataclass(frozen=True)
class Turning:
    """How a layer turns queries.

    Attributes:
        positions: the option, ``renumbered`` or ``capped``.
        n_first: first tokens, which are always in the first slots.
        trained: tokens of a context that the model was trained for.
        rope: of the layer.
    """

    positions: str
    n_first: int
    trained: int
    rope: Rope

    def of(self, query: torch.Tensor, step: PagedMetadata) -> torch.Tensor:
        """What sees the first slots, fp32 [T, n, H, D], for the queries [T, H, D] of a step, or one turn of it."""
        assert step.first_positions is not None
        by = self.by(step.query_start_loc, step.seq_lens, step.first_positions)
        return self.rope.turned_back(query[: len(by)], by)

    def by(self, starts: torch.Tensor, seq_lens: torch.Tensor, first_positions: torch.Tensor) -> torch.Tensor:
        """int64 [T, n]: by how many positions each row is turned back for each of the first slots."""
        n_rows = (starts[1:] - starts[:-1]).long()
        row = torch.arange(int(starts[-1])) - starts[:-1].long().repeat_interleave(n_rows)
        position = first_positions[: len(n_rows)].long().repeat_interleave(n_rows) + row
        slots = torch.arange(self.n_first)
        if self.positions == "capped":
            return (position[:, None] - slots - self.trained).clamp(min=0)
        slot = (seq_lens[: len(n_rows)].long() - n_rows).repeat_interleave(n_rows) + row
        return (position - slot)[:, None].expand(-1, self.n_first)


def turning_of(vllm_config: Any, model: torch.nn.Module, layer: torch.nn.Module) -> Turning | None:
    """How queries are turned in one attention layer of a loaded model; None where tokens are seen where they are.

    Raises:
        ValueError: no rotary embedding is found beside the layer, or one that cannot be composed.
    """
    engine = PagedEngine.of(vllm_config)
    if engine is None or engine.options.positions == "original":
        return None
    assert engine.retention is not None
    options, trained = engine.options, trained_for(engine, vllm_config.model_config)
    names = {module: name for name, module in model.named_modules()}
    owner = model.get_submodule(names[layer].rpartition(".")[0])
    return Turning(options.positions, engine.retention.sinks, trained, rope_of(getattr(owner, "rotary_emb", None)))


def trained_for(engine: PagedEngine, model_config: Any) -> int:
    """Tokens of a context that the model was trained for."""
    return int(engine.options.trained or model_config.hf_text_config.max_position_embeddings)


def rope_of(module: Any) -> Rope:
    """The angles of a rotary embedding of vLLM's.

    Raises:
        ValueError: another kind of embedding, or none.
    """
    kind = type(module)
    if kind in (RotaryEmbedding, Llama3RotaryEmbedding):
        frequencies = module._compute_inv_freq(module.base)
    elif kind is LinearScalingRotaryEmbedding and len(module.scaling_factors) == 1:
        frequencies = module._compute_inv_freq(module.base) / module.scaling_factors[0]
    elif kind is YaRNScalingRotaryEmbedding:
        frequencies = module._compute_inv_freq(module.scaling_factor)
    else:
        found = "none" if module is None else kind.__name__
        raise ValueError(_cannot(f"{found} beside a layer"))
    frequencies = frequencies.double().cpu()
    n = min(len(module.cos_sin_cache), 64)
    angles = torch.arange(n)[:, None].double() * frequencies
    expected = torch.cat([angles.cos(), angles.sin()], -1) * getattr(module, "mscale", 1.0)
    if not torch.allclose(module.cos_sin_cache[:n].double().cpu(), expected, atol=0.02):  # bfloat16, near one
        raise ValueError(_cannot(f"{kind.__name__} whose table says otherwise"))
    return Rope(frequencies, bool(module.is_neox_style))


def _cannot(found: str) -> str:
    return (
        f"positions other than 'original' turn queries by the angles of a rotary embedding ({', '.join(KNOWN_ROPES)}), "
        f"and the model has {found}: {REMEDY}"
    )


def position_refusals(vllm_config: Any, engine: PagedEngine) -> list[str]:
    """Models and devices on which queries cannot be turned, before weights load."""
    options, config = engine.options, vllm_config.model_config.hf_text_config
    if options.positions == "original":
        return []
    reasons = []
    if current_platform.is_cuda():
        reasons.append(f"sparq option positions={options.positions!r} runs on CPU alone so far: {REMEDY}")
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "none")
    if kind not in KNOWN_ROPES or any(rope.get(name) for name in OTHERS):
        reasons.append(_cannot(f"rope_parameters {rope}" if rope else "none in its configuration"))
        return reasons
    retention, trained = engine.retention, trained_for(engine, vllm_config.model_config)
    assert retention is not None
    seen = retention.budget_of(0) + retention.segment
    if seen > trained:
        most = trained - retention.segment
        fits = (
            f"use budget <= {most}, or say" if most >= retention.least_budget else "no budget is small enough, so say"
        )
        reasons.append(
            f"sparq option budget={retention.budget_of(0)} and the {retention.segment} tokens of a prompt that come "
            f"between two evictions are {seen}, more than the {trained} that the model was trained for: {fits} in "
            "the option trained what it was trained for"
        )
    return reasons
