"""Tiny GGUF files as llama.cpp's converter would write them, from models of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

LICENCE = "apache-2.0"
BYTES = [bytes([i]).decode("latin-1") for i in range(33, 127)]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "Ġ", "th", "the"]
MERGES = ["t h", "th e"]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e", "th", "the"]
NORMS = ("norm", "layernorm")

LLAMA_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_PARTS = {
    **LLAMA_PARTS,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama() -> Any:
    """Random, 2 layers, 4 query heads on 2 KV heads, in numbers that bfloat16 holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return _in_bfloat16(LlamaForCausalLM(config))


def tiny_gemma3() -> Any:
    """Random, 6 layers, the last with full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=len(PIECES),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=128,
        sliding_window=8,
    )
    torch.manual_seed(0)
    return _in_bfloat16(Gemma3ForCausalLM(config))


def _in_bfloat16(model: Any) -> Any:
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
            weight.copy_(weight.bfloat16())
    return model.eval()


def write_llama(model: Any, path: Path, *, licence: str = LICENCE, kind: str = "llama") -> None:
    """The file of `tiny_llama`, its rows of q and k permuted, down_proj in 8 bits."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    _describe(writer, config, licence)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        stored = weight.numpy()
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if part in heads:
            n, (rows, columns) = heads[part], stored.shape
            stored = stored.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(_stored_name(name, LLAMA_PARTS), np.ascontiguousarray(stored))
    _close(writer)


def write_gemma3(model: Any, path: Path) -> None:
    """The file of `tiny_gemma3`, its norms as 1 + weight."""
    config = model.config
    writer = gguf.GGUFWriter(path, "gemma3")
    _describe(writer, config, "gemma")
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * (len(PIECES) - 260))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        stored = weight.float().numpy() + (1 if name.removesuffix(".weight").endswith(NORMS) else 0)
        writer.add_tensor(_stored_name(name, GEMMA_PARTS), stored)
    _close(writer)


def _describe(writer: gguf.GGUFWriter, config: Any, licence: str) -> None:
    writer.add_license(licence)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    theta = config.rope_parameters
    theta = theta.get("full_attention", theta)["rope_theta"]
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _stored_name(name: str, parts: dict[str, str]) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{parts[part]}.weight"


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
