"""One tiny model of every family, with all that sets the family apart.

A new family adds an entry to MODELS; docs/models.md is written from this table.
"""

from __future__ import annotations

import torch
import transformers
from safetensors.torch import load_file
from tiny_models import SIZES, save_model

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
EXPERTS_ALWAYS_NORMALISED = {
    key: value for key, value in EXPERTS.items() if key != "norm_topk_prob"
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    # So short that 30 tokens tell the frequencies from plain ones; 4 * 128 are all positions.
    "original_max_position_embeddings": 128,
    "beta_fast": 8.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4}
LLAMA_3 = LINEAR | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
LONGROPE = PARTIAL | {
    "rope_type": "longrope",
    "attention_factor": 1.2,
    "short_factor": [1.0 + i / 8 for i in range(12)],
    "long_factor": [1.0 + i / 2 for i in range(12)],
}
MINISTRAL_ROPE = YARN | {
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
OLMO3 = {
    "hidden_size": 128,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": YARN,
    },
}
SIGMOID_EXPERTS = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
GLM = SIGMOID_EXPERTS | {
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
}
MOONLIGHT = SIGMOID_EXPERTS | {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": None,
    # The latent attention of vLLM on CPU has kernels for 512 + 64 numbers per token only.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 16,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
}
GEMMA3 = {
    "sliding_window": 5,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 20,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    },
}
DEEPSEEK_V2 = MOONLIGHT | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
}
del DEEPSEEK_V2["num_nextn_predict_layers"]
LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
MODELS = {
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK_V2),
    "deepseek_v2-groups": (
        "DeepseekV2Config",
        DEEPSEEK_V2
        | {
            "q_lora_rank": 48,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        MOONLIGHT
        | {
            "q_lora_rank": 48,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3-moonlight": ("DeepseekV3Config", MOONLIGHT),
    "deepseek_v3-mscale": (
        "DeepseekV3Config",
        MOONLIGHT | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3),
    "llama": ("LlamaConfig", {}),
    "llama-llama3": ("LlamaConfig", {"rope_parameters": LLAMA_3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 5}),
    "ministral": (
        "MinistralConfig",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # Positions from 16 on have scaled queries.
    "ministral3": ("Ministral3Config", {"rope_parameters": MINISTRAL_ROPE}),
    "ministral3-window": (
        "Ministral3Config",
        {"rope_parameters": MINISTRAL_ROPE, "sliding_window": 20},
    ),
    "olmo2": ("Olmo2Config", {"hidden_size": 128}),
    # The first layer has a window, the second sees all, with another rotary embedding.
    "olmo3": ("Olmo3Config", OLMO3),
    "phi3": ("Phi3Config", {"hidden_size": 128}),
    "phi3-window": ("Phi3Config", {"hidden_size": 128, "sliding_window": 5}),
    "phi3-partial": ("Phi3Config", {"hidden_size": 128, "rope_parameters": PARTIAL}),
    "phi3-longrope": (
        "Phi3Config",
        {
            "hidden_size": 128,
            "original_max_position_embeddings": 16,  # so that rows are long
            "rope_parameters": LONGROPE,
        },
    ),
    "qwen2": ("Qwen2Config", {"hidden_size": 128}),  # heads of 32, without head_dim
    "qwen2-window": ("Qwen2Config", {"hidden_size": 128, **WINDOW}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-yarn": ("Qwen3Config", {"rope_parameters": YARN}),
    "qwen3-yarn-factor": (
        "Qwen3Config",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}},
    ),
    "qwen3-window": ("Qwen3Config", WINDOW),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "qwen3_5_text": (
        "Qwen3_5TextConfig",
        LINEAR_ATTENTION
        | {
            "rope_parameters": LINEAR_ATTENTION["rope_parameters"]
            | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        LINEAR_ATTENTION | EXPERTS_ALWAYS_NORMALISED | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        LINEAR_ATTENTION | EXPERTS | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe-window": ("Qwen3MoeConfig", EXPERTS | WINDOW),
    "seed_oss": ("SeedOssConfig", {}),
    # Of two layers the second has no rotary embedding.
    "smollm3": ("SmolLM3Config", {"hidden_size": 128, "no_rope_layer_interval": 2}),
    "qwen3_moe-sparse-step": (
        "Qwen3MoeConfig",
        EXPERTS
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", GLM),
    "glm4_moe-qk-norm": (
        "Glm4MoeConfig",
        GLM | {"use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 0.25},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        EXPERTS
        | {
            "hidden_size": 128,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
        },
    ),
}
"""Name -> config class of transformers, options. The name begins with the model_type."""

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
WITHOUT = {
    "deepseek_v2": {"routed_scaling_factor": 1.0},
    "deepseek_v2-groups": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "deepseek_v3-moonlight": {"routed_scaling_factor": 1.0},
    "deepseek_v3-mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "glm4_moe": {"partial_rotary_factor": 1.0},
    "glm4_moe-qk-norm": {"partial_rotary_factor": 0.5},
    "qwen2_moe": {"norm_topk_prob": True},
    "llama-llama3": {"rope_parameters": PLAIN_ROPE},
    "llama-linear": {"rope_parameters": PLAIN_ROPE},
    "ministral": {"layer_types": ["full_attention"] * 2},
    "ministral3": {"rope_parameters": MINISTRAL_ROPE | {"llama_4_scaling_beta": 0.0}},
    "ministral3-window": {"sliding_window": None},
    "mistral-window": {"sliding_window": None},
    "olmo3": {"layer_types": ["full_attention"] * 2},
    "phi3-window": {"sliding_window": None},
    "phi3-partial": {"rope_parameters": PLAIN_ROPE},
    "phi3-longrope": {"rope_parameters": PARTIAL},
    "qwen2-window": {"use_sliding_window": False},
    "qwen3-yarn": {"rope_parameters": PLAIN_ROPE},
    "qwen3-yarn-factor": {"rope_parameters": YARN},
    "qwen3-window": {"use_sliding_window": False},
    "qwen3_moe-window": {"use_sliding_window": False},
    "qwen3_5_text": {"rope_parameters": PARTIAL},
    "qwen3_5_moe_text": {"rope_parameters": PARTIAL},
    "qwen3_next": {"rope_parameters": PARTIAL},
    "smollm3": {"no_rope_layers": [1, 1]},
}
"""Name -> options that switch a feature off which the model has."""
NOT_TESTED: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        [("qwen3_5_moe_text", "engine"), ("qwen3_5_text", "engine")],
        "vLLM's file of this family needs torchvision, which the packages for CPU do not have, and "
        "vLLM on CPU has linear attention in bfloat16 only",
    ),
    ("qwen3_next", "engine"): "vLLM on CPU has linear attention in bfloat16 only: its synced "
    "engine equals a fresh one in that type",
}
"""(model, "one rank", "TP 2", "PP 2" or "engine") that no test can run -> why."""
IN_BFLOAT16 = ("qwen3_next",)
"""Models whose synced engine is tested in bfloat16, against a fresh one."""
GPU_RUN = "2026-11-30, two H200 with vLLM 0.26.0, megatron-core 0.19.2 and TE 2.20.2"
"""When the tests of GPUs were last run, and on what."""
NOT_ON_GPUS: dict[str, str] = {
    "qwen3_next": "linear attention of vLLM 0.26 needs flashinfer, which the host of the tests "
    "does not have, so no engine was tested; weights and log-probs were",
    "deepseek_v2-groups": "it was added after that run",
    "qwen3_5_moe_text": "it was added after that run",
    "qwen3_5_text": "vLLM 0.26 has this family with images only, so no engine was tested; weights "
    "and log-probs were",
}
"""Models whose synced engine the tests of GPUs leave out -> why."""
THROUGH_THE_LOADER = frozenset(
    {
        name
        for name, (_, options) in MODELS.items()
        if "num_experts_per_tok" in options or (name, "engine") in NOT_TESTED
    }
)
"""Models whose weights vLLM's loader changes or packs, on CPU, so that no sync is in place."""


@torch.no_grad()
def save_family_model(folder, name, *, seed=0, **without):
    """Write a random fp32 model in which norms and biases matter too."""
    config_class, options = MODELS[name]
    options = {"tie_word_embeddings": False} | options | without
    config = getattr(transformers, config_class)(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = torch.Generator().manual_seed(seed)
    spread = 1.2 / config.hidden_size**0.5  # or sums in wide models round by more than 1e-5
    for name, parameter in model.named_parameters():
        mean = parameter.mean() if "norm" in name else 0.0  # 1, or 0 if 1 + weight is the factor
        parameter.normal_(0.0, spread, generator=rng).add_(mean)
        if "kv_b_proj" in name:  # its sums have 512 terms
            parameter /= 6.0
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.normal_(0.0, 0.2, generator=rng)
    save_model(model, folder)


def transformers_model(folder):
    """transformers' own model, in fp32 and without fused kernels."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@torch.no_grad()
def gradient_by_name(model, folder):
    """The gradient of transformers' model, by the names that tensors have in checkpoints.

    transformers holds some tensors in another form than checkpoints do (all experts in one), and
    converts them when it saves: so the gradient is saved in place of the weights.
    """
    for parameter in model.parameters():
        gradient = parameter.grad
        parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
