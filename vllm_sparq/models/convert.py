"""A GGUF file as a folder that vLLM loads: config.json, weights in bfloat16, tokenizer.

The `gguf` package reads and dequantizes; here is only what the two ways to store a model differ in. llama.cpp stores
the rows of a llama's q and k so that the two halves of a rotated pair are neighbours, and Gemma's norms as
``1 + weight``. The tokenizer is made by `transformers`, from the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparq.console import UsageError
from vllm_sparq.models.scratch import beside, put

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files without which a folder is no model."""

Fields = Mapping[str, Any]
"""Key of the GGUF file -> value, the architecture's prefix taken off."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA = {**LAYER, "ffn_norm": "post_attention_layernorm"}
GEMMA3 = {
    **LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """What a model of this kind needs beyond names.

    Attributes:
        names: GGUF's names of a layer's parts -> ours.
        config: what config.json says, from the fields, besides what all say.
        weight: a dequantized weight as `transformers` has it, from its GGUF name.
    """

    names: Mapping[str, str]
    config: Callable[[Fields], dict[str, Any]]
    weight: Callable[[str, Any, Fields], Any]


def _llama_config(fields: Fields) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": fields["rope.dimension_count"],
    }


def _llama_weight(name: str, weight: Any, fields: Fields) -> Any:
    heads = {"attn_q": fields["attention.head_count"], "attn_k": fields["attention.head_count_kv"]}.get(name)
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gemma3_config(fields: Fields) -> dict[str, Any]:
    n_layers = fields["block_count"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": fields["attention.key_length"],
        "query_pre_attn_scalar": fields["attention.key_length"],
        "sliding_window": fields["attention.sliding_window"],
        "rope_local_base_freq": 10000.0,
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(n_layers)],
    }


def _gemma3_weight(name: str, weight: Any, fields: Fields) -> Any:
    return weight - 1 if name.endswith("norm") else weight


ARCHITECTURES = {
    "llama": Architecture(LLAMA, _llama_config, _llama_weight),
    "gemma3": Architecture(GEMMA3, _gemma3_config, _gemma3_weight),
}
"""`general.architecture` -> what to do."""


def is_whole(folder: Path) -> bool:
    """Whether a model of `convert` is there."""
    return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))


def convert(file: Path, folder: Path, *, opens_with_token: bool, licence: str | None = None) -> None:
    """Write the model of a GGUF file to a folder, which appears only when it is whole.

    Args:
        file: the GGUF file.
        folder: a whole model that is there stays, one that another process has made meanwhile too.
        opens_with_token: the tokenizer puts its opening token before every text.
        licence: what the file must say of itself; None for whatever it says.

    Raises:
        UsageError: no package `gguf`, a broken file, another licence, an architecture without a row.
    """
    reader = _open(file)
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    if licence is not None and said.get("general.license") != licence:
        raise UsageError(f"{file} says licence {said.get('general.license')!r}, and {licence!r} was expected: not used")
    kind = said.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UsageError(f"{file} holds a model of architecture {kind!r}; there are {', '.join(ARCHITECTURES)}")
    fields = {name.removeprefix(f"{kind}."): value for name, value in said.items()}
    ids = {
        f"{name}_token_id": reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for name in ("bos", "eos")
        if f"tokenizer.ggml.{name}_token_id" in reader.fields
    }
    with beside(folder) as scratch:
        unfinished = scratch / folder.name  # and not the scratch folder, which is for our eyes only
        unfinished.mkdir()
        vocabulary = _write_weights(reader, ARCHITECTURES[kind], fields, unfinished)
        config = {**ARCHITECTURES[kind].config(fields), **_config(fields, ids, vocabulary, reader)}
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2))
        (unfinished / "generation_config.json").write_text(json.dumps(ids, indent=2))
        _write_tokenizer(file, unfinished, opens_with_token, said.get("tokenizer.chat_template"))
        put(unfinished, folder, is_whole)


def _open(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise UsageError(
            "a model by name is converted by the package gguf, which is not here: pip install gguf"
        ) from None
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UsageError(f"{file} is no GGUF file that can be read ({error}): get it again") from None


def _config(fields: Fields, ids: dict[str, int], vocabulary: int, reader: Any) -> dict[str, Any]:
    """What config.json of every architecture says."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["rope.freq_base"],
        "max_position_embeddings": fields["context_length"],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
        **ids,
    }


def _write_weights(reader: Any, kind: Architecture, fields: Fields, folder: Path) -> int:
    """All weights, in one file; returns the rows of the embedding."""
    import torch
    from safetensors.torch import save_file

    found: dict[str, torch.Tensor] = {}
    for name, part, weight in _weights(reader, kind):
        # a copy: what the reader gives may be a window into the file, and what is swapped is not contiguous
        found[name] = torch.tensor(kind.weight(part, weight, fields)).to(torch.bfloat16).contiguous()
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    return int(found["model.embed_tokens.weight"].shape[0])


def _weights(reader: Any, kind: Architecture) -> Iterator[tuple[str, str, Any]]:
    """Name for `transformers`, name of the part in the file, and the dequantized weight of every tensor."""
    from gguf import dequantize

    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem == "rope_freqs":
            continue
        if stem.startswith("blk."):
            _, layer, part = stem.split(".", 2)
            ours = kind.names.get(part)
            name = f"model.layers.{layer}.{ours}.weight"
        else:
            part, ours = stem, OUTSIDE.get(stem)
            name = f"{ours}.weight"
        if ours is None:
            raise UsageError(f"tensor {tensor.name!r} of the file has no place in the model: its conversion is unknown")
        yield name, part, dequantize(tensor.data, tensor.tensor_type)


def _write_tokenizer(file: Path, folder: Path, opens_with_token: bool, template: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if opens_with_token:
        _open_with_token(folder, tokenizer)


def _open_with_token(folder: Path, tokenizer: Any) -> None:
    """Have the saved tokenizer put its opening token first, which the conversion forgets."""
    path = folder / "tokenizer.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    token, number = tokenizer.bos_token, tokenizer.bos_token_id
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    saved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, {"SpecialToken": {"id": token, "type_id": 1}}, two],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    path.write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
