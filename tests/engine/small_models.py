"""Models of random weights, small enough that an engine over one starts in a second. Nothing in them is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def llama(folder: Path, *, seed: int, **changes: Any) -> Path:
    """A Llama in ``folder``: two layers of two query heads on one KV head of 64, but for ``changes``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    return folder


def gemma3(folder: Path, *, seed: int, full: list[bool], **changes: Any) -> Path:
    """A Gemma 3 in ``folder``, four query heads on two KV heads of 64; layers that are not ``full`` see 64 tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = dict(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=len(full),
        layer_types=["full_attention" if one else "sliding_attention" for one in full],
        sliding_window=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.1,  # wide enough that answers are not all alike
    )
    torch.manual_seed(seed)
    Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **changes})).save_pretrained(folder)
    return folder
