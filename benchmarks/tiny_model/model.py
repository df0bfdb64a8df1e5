"""The model as it is trained on a CPU, and its export as a Hugging Face LlamaForCausalLM.

Parameters bear the names of the Hugging Face checkpoint. A forward pass computes what `LlamaForCausalLM` does, with
bfloat16 products in the linear layers, and logits only at the positions that carry loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vllm_sparq.benchmarks.tiny_model.tokenizer import BOS, EOS, PAD, SPECIAL, VOCABULARY


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model; H query heads in G groups of D dimensions."""

    vocab_size: int = VOCABULARY
    hidden_size: int = 320
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; projections are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q_size, hidden),
            layer + "self_attn.k_proj.weight": (kv_size, hidden),
            layer + "self_attn.v_proj.weight": (kv_size, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q_size),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def rope_frequencies(config: Config) -> Tensor:
    """Radians per position of the D / 2 dimension pairs (i, i + D / 2), fastest first."""
    half = config.head_dim // 2
    return config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, heads, T, D] with cos and sin [B, 1, T, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def linear(x: Tensor, *weights: Tensor) -> Tensor:
    """x @ W.T in bfloat16 for the weights stacked on top of one another, as float32."""
    return F.linear(x.bfloat16(), torch.cat([w.bfloat16() for w in weights])).float()


class Model:
    """Parameters in float32 with a forward pass for training."""

    def __init__(self, config: Config, parameters: dict[str, Tensor]) -> None:
        expected = parameter_shapes(config)
        found = {name: tuple(p.shape) for name, p in parameters.items()}
        if found != expected:
            wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
            raise ValueError(f"parameters do not fit the config: {wrong}")
        self.config = config
        self.parameters = {name: p.float().requires_grad_() for name, p in parameters.items()}
        self.frequencies = rope_frequencies(config)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.parameters[name + ".weight"], self.config.rms_norm_eps)

    def attention(self, x: Tensor, layer: str, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal grouped-query attention, x [B, T, hidden]."""
        c, p = self.config, self.parameters
        n_requests, n_tokens, _ = x.shape
        qkv = linear(x, *(p[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"))
        qkv = qkv.view(n_requests, n_tokens, -1, c.head_dim).transpose(1, 2)
        q, k, v = torch.split(qkv, [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        group = c.num_attention_heads // c.num_key_value_heads
        k, v = rotate(k, cos, sin).repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        q = rotate(q, cos, sin)
        if n_tokens > 256:  # below, the conversions cost more than the products
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(out.transpose(1, 2).flatten(2), p[f"{layer}.self_attn.o_proj.weight"])

    def mlp(self, x: Tensor, layer: str) -> Tensor:
        p = self.parameters
        gate, up = linear(x, p[f"{layer}.mlp.gate_proj.weight"], p[f"{layer}.mlp.up_proj.weight"]).chunk(2, dim=-1)
        return linear(F.silu(gate) * up, p[f"{layer}.mlp.down_proj.weight"])

    def logits(self, ids: Tensor, positions: Tensor, where: Tensor) -> Tensor:
        """Logits [n, vocabulary] at the n places of ids [B, T] that `where` [B, T] selects."""
        angles = positions[:, None, :, None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        embeddings = self.parameters["model.embed_tokens.weight"]
        x = F.embedding(ids, embeddings)
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = x + self.attention(self.norm(x, layer + ".input_layernorm"), layer, cos, sin)
            x = x + self.mlp(self.norm(x, layer + ".post_attention_layernorm"), layer)
        return linear(self.norm(x[where], "model.norm"), embeddings)


def save_model(config: Config, parameters: dict[str, Tensor], folder: Path) -> None:
    """Write the weights in bfloat16 with the configuration that `LlamaForCausalLM` reads."""
    ids = {f"{name}_token_id": SPECIAL.index(token) for name, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    sizes = {name: value for name, value in vars(config).items() if name != "rope_theta"}
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **ids,
    }
    generation = {"do_sample": False, **ids}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in parameters.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
