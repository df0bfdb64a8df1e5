"""The architectures: configurations small enough that an engine over one starts in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FULL, WINDOW = "full_attention", "sliding_attention"
BASE: dict[str, Any] = dict(
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=512,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Model:
    """A tiny model.

    Attributes:
        architecture: its class in vLLM.
        config: what ``config.json`` says.
        dtype: what it runs in; bfloat16 where stock vLLM has nothing else on CPU.
        arguments: of its engines.
        without: methods that the model's engines refuse.
        imports: a package that vLLM imports for it and the lock leaves out.
    """

    architecture: str
    config: dict[str, Any]
    dtype: str = "float32"
    arguments: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    imports: str | None = None

    def write(self, folder: Path) -> Path:
        """Its folder, without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"architectures": [self.architecture], **self.config}))
        return folder


def model(architecture: str, model_type: str, *, without: tuple[str, ...] = (), **changes: Any) -> Model:
    """`BASE` with what is different."""
    kept = {name: value for name, value in BASE.items() if name not in without}
    return Model(architecture, {**kept, "model_type": model_type, **changes})


def no_eviction(one: Model) -> Model:
    """Caches that several layers read are not evicted from."""
    return replace(one, without=("h2o",))


def in_bfloat16(one: Model) -> Model:
    return replace(one, dtype="bfloat16")


MOE: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
MAMBA2: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=64, mamba_d_state=32, mamba_n_groups=1, mamba_d_conv=4)
WINDOWS: dict[str, Any] = dict(sliding_window=64, layer_types=[WINDOW, WINDOW, WINDOW, FULL])
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DELTA: dict[str, Any] = dict(
    layer_types=["linear_attention", "linear_attention", "linear_attention", FULL],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    full_attention_interval=4,
    partial_rotary_factor=0.25,
    rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
)

CLASSIC: dict[str, Model] = {
    "llama": model("LlamaForCausalLM", "llama"),
    "llama-3.2-rope": model(
        "LlamaForCausalLM",
        "llama",
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=512,
        ),
    ),
    "mistral": model("MistralForCausalLM", "mistral", sliding_window=None),
    "mixtral": model("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2": model("Qwen2ForCausalLM", "qwen2"),
    "qwen3": model("Qwen3ForCausalLM", "qwen3"),
    "qwen3-moe": model("Qwen3MoeForCausalLM", "qwen3_moe", **MOE, decoder_sparse_step=1, norm_topk_prob=True),
    "mimo": model("MiMoForCausalLM", "qwen2"),  # the checkpoint brings a class of its own, below Qwen2's
    "phi-3": model("Phi3ForCausalLM", "phi3", original_max_position_embeddings=4096),
    "olmo-2": model("Olmo2ForCausalLM", "olmo2"),
    "olmo-3": model("Olmo3ForCausalLM", "olmo3", **WINDOWS),
    "olmoe": model("OlmoeForCausalLM", "olmoe", num_experts=4, num_experts_per_tok=2),
    "glm-4": model("Glm4ForCausalLM", "glm4", partial_rotary_factor=0.5),
    "glm-4-moe": model(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        moe_intermediate_size=128,
        num_experts_per_tok=2,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        partial_rotary_factor=0.5,
        n_group=1,
        topk_group=1,
    ),
    "granite": model("GraniteForCausalLM", "granite", attention_multiplier=0.125),
    "cohere": model("CohereForCausalLM", "cohere"),
    "cohere-2": model("Cohere2ForCausalLM", "cohere2", **WINDOWS),
    "exaone-4": model("Exaone4ForCausalLM", "exaone4", **WINDOWS, sliding_window_pattern="LLLG"),
    "gemma": model("GemmaForCausalLM", "gemma"),
    "gemma-3": model("Gemma3ForCausalLM", "gemma3_text", **WINDOWS, query_pre_attn_scalar=64),
    "ministral": model("MinistralForCausalLM", "ministral", **WINDOWS),
    "smollm-3": model("SmolLM3ForCausalLM", "smollm3"),
    "seed-oss": model("SeedOssForCausalLM", "seed_oss"),
    "hunyuan": model("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "ernie-4.5": model("Ernie4_5ForCausalLM", "ernie4_5"),
    "arcee": model("ArceeForCausalLM", "arcee"),
    "apertus": model("ApertusForCausalLM", "apertus"),
    "nemotron": model("NemotronForCausalLM", "nemotron"),
    "stablelm": model("StableLmForCausalLM", "stablelm"),
    "starcoder-2": model("Starcoder2ForCausalLM", "starcoder2", sliding_window=None),
    "gpt-neox": model("GPTNeoXForCausalLM", "gpt_neox", without=("num_key_value_heads",)),
    "gpt-j": model(
        "GPTJForCausalLM",
        "gptj",
        without=("num_key_value_heads", "head_dim"),
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=4096,
        rotary_dim=32,
    ),
    "gpt-2": model(
        "GPT2LMHeadModel",
        "gpt2",
        without=("num_key_value_heads", "head_dim"),
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=4096,
    ),
    "gpt-bigcode": model(
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        without=("num_key_value_heads", "head_dim"),
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=4096,
    ),
    "opt": model(
        "OPTForCausalLM", "opt", without=("num_key_value_heads", "head_dim"), ffn_dim=256, word_embed_proj_dim=256
    ),
    "falcon": model(
        "FalconForCausalLM", "falcon", without=("num_key_value_heads", "head_dim"), alibi=False, num_kv_heads=1
    ),
}
"""What runs alike from the first release on."""

LOGITS: dict[str, Model] = {
    "gpt-oss": model(
        "GptOssForCausalLM",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
        layer_types=[WINDOW, FULL] * 2,
    ),
    "gemma-2": model(
        "Gemma2ForCausalLM",
        "gemma2",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=64,
        sliding_window=64,
    ),
    "granite-swa": model("GraniteForCausalLM", "granite", **WINDOWS, attention_multiplier=0.125),
}
"""Softmaxes that are over more than the tokens, or over other logits."""

SHARED: dict[str, Model] = {
    "gemma-3n": no_eviction(
        model(
            "Gemma3nForCausalLM",
            "gemma3n_text",
            num_kv_shared_layers=2,
            layer_types=[WINDOW, FULL, WINDOW, FULL],
            sliding_window=64,
            intermediate_size=[256] * 4,
            hidden_size_per_layer_input=64,
            vocab_size_per_layer_input=512,
            laurel_rank=16,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ),
    "gemma-4": model(
        "Gemma4ForCausalLM",
        "gemma4_text",
        **WINDOWS,
        global_head_dim=512,
        hidden_size_per_layer_input=64,
        vocab_size_per_layer_input=512,
    ),
    "gemma-4-e2b": no_eviction(
        model(
            "Gemma4ForCausalLM",
            "gemma4_text",
            num_hidden_layers=6,
            num_kv_shared_layers=3,
            layer_types=[WINDOW, FULL, WINDOW, WINDOW, FULL, FULL],
            sliding_window=64,
            global_head_dim=128,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=64,
            vocab_size_per_layer_input=512,
        )
    ),
}
"""Layers that read what others have cached, and heads of another size beside them."""

CHUNKS: dict[str, Model] = {
    "llama-4": model(
        "Llama4ForCausalLM",
        "llama4_text",
        attention_chunk_size=128,
        num_local_experts=2,
        intermediate_size_mlp=256,
        attn_temperature_tuning=True,
        floor_scale=256,
    )
}
"""Layers that attend within chunks of the context, beside ones of full attention without positions."""

STATES: dict[str, Model] = {
    "qwen3.5": replace(
        in_bfloat16(model("Qwen3_5ForCausalLM", "qwen3_5_text", **DELTA)),
        imports="torchvision",  # built for the CPU's torch
    ),
    "qwen3-next": in_bfloat16(
        model(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            **DELTA,
            **MOE,
            shared_expert_intermediate_size=128,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            mlp_only_layers=[],
        )
    ),
    "granite-4": model(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        **MAMBA2,
        layer_types=["mamba", "mamba", "mamba", "attention"],
        mamba_expand=2,
        mamba_chunk_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
        attention_multiplier=0.125,
        position_embedding_type="rope",
    ),
    "nemotron-h": model(
        "NemotronHForCausalLM",
        "nemotron_h",
        hybrid_override_pattern="M-M*",
        mamba_num_heads=8,
        mamba_head_dim=64,
        ssm_state_size=32,
        n_groups=1,
        conv_kernel=4,
        chunk_size=64,
        mlp_hidden_act="relu2",
        attention_head_dim=64,
    ),
    "falcon-h1": model(
        "FalconH1ForCausalLM",
        "falcon_h1",
        mamba_d_ssm=512,
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_chunk_size=64,
        mlp_multipliers=[1.0, 1.0],
        ssm_multipliers=[1.0, 1.0, 1.0, 1.0, 1.0],
        key_multiplier=1.0,
        embedding_multiplier=1.0,
    ),
    "lfm2": model(
        "Lfm2ForCausalLM",
        "lfm2",
        layer_types=["conv", "conv", "conv", FULL],
        conv_dim=256,
        conv_L_cache=3,
        conv_bias=False,
        block_dim=256,
        block_ff_dim=256,
        block_multiple_of=16,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        norm_eps=1e-5,
    ),
    "zamba-2": model(
        "Zamba2ForCausalLM",
        "zamba2",
        without=("head_dim",),
        num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        num_mem_blocks=1,
        attention_hidden_size=512,
        attention_head_dim=128,
        mamba_d_state=32,
        mamba_d_conv=4,
        mamba_expand=2,
        n_mamba_heads=8,
        mamba_headdim=64,
        mamba_ngroups=1,
        adapter_rank=16,
        chunk_size=64,
        use_mem_rope=True,
        hidden_act="gelu",
    ),
}
"""Attention beside layers with a state."""

REFUSED: dict[str, Model] = {
    "bloom": model("BloomForCausalLM", "bloom", n_head=4, n_layer=4),
    "deepseek-v2": model(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        kv_lora_rank=64,
        q_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
    ),
    "mamba-2": model("Mamba2ForCausalLM", "mamba2", num_heads=8, head_dim=64, state_size=16, n_groups=1),
    "mimo-v2": model(
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        v_head_dim=32,
        sliding_window=64,
        sliding_window_size=64,
        layer_types=[FULL, WINDOW, WINDOW, FULL],
        hybrid_layer_pattern=[0, 1, 1, 0],
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=64,
        swa_v_head_dim=32,
        add_swa_attention_sink_bias=True,
        attention_bias=False,
        layernorm_epsilon=1e-5,
        moe_layer_freq=[0, 1, 1, 1],
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
    ),
    "mistral-v0.1": model("MistralForCausalLM", "mistral", sliding_window=64),
}
"""What is refused, with the reason."""

MODELS: dict[str, Model] = {**CLASSIC, **LOGITS, **SHARED, **CHUNKS, **STATES, **REFUSED}
