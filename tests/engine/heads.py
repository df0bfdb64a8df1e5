"""A drafting head for the bundled model, which nobody has trained: made of the model's own layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.support import MODEL

NOISE = 0.2
"""Added to the weights of the head, in standard deviations of each: so a part of its drafts is wrong."""


def eagle_head(folder: Path) -> Path:
    """An EAGLE head in ``folder``: the model's layers over the embedding of the next token, its hidden state unused.

    A head has neither a norm before its first layer nor one after its last. What the first weighs becomes part of the
    matrices after it, what it divides by is taken for that of an average embedding; the other is left out.
    """
    config = json.loads((MODEL / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    generator, size = torch.Generator().manual_seed(1), config["hidden_size"]
    embeddings = weights.pop("model.embed_tokens.weight")
    first = weights.pop("model.layers.0.input_layernorm.weight") / embeddings.square().mean().sqrt()
    for part in "qkv":
        weights[f"model.layers.0.self_attn.{part}_proj.weight"] *= first
    del weights["model.norm.weight"]
    head = {"fc.weight": torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)}
    for name, tensor in weights.items():
        noise = NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else 0
        head[name.removeprefix("model.")] = tensor + noise
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in head.items()}, folder / "model.safetensors")
    changed: dict[str, Any] = {"tie_word_embeddings": False, "dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder
