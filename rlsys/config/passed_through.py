"""Options of vLLM and megatron-core that configs pass through, and those that rlsys sets itself.

tests/actors/test_passed_through.py compares the tables with what the engines really pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlsys.library_options import option_problems, options_of
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import Config, RunConfig

_LOGPROBS = "rlsys computes log-probs itself, in chunks and not from the output layer"
_MODEL = "it belongs to the model, whose config.json vLLM and transformers read too"
_ENGINES = "an engine is cut by rollout.tensor_parallel_size only; for more engines there is "
_ENGINES += "rollout.num_engines"
_LORA = "rlsys has one adapter, the policy's"
_SYNC = "weight sync depends on it"
_CODE = "code of a model folder is never run"

VLLM_FIELDS = {
    "model": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "data.max_prompt_length, rollout.max_completion_length",
    "max_num_seqs": "rollout.max_num_seqs",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization, rollout.engines_per_gpu",
    "kv_cache_memory_bytes": "rollout.kv_cache_memory_mb",
    "skip_tokenizer_init": "rollout.stop",
    "enable_return_routed_experts": "rollout.router_replay",
    "quantization": "rollout.quantization",
    "speculative_config": "rollout.speculative_config",
    "enable_sleep_mode": "placement",
    "enable_lora": "policy.lora, weight_sync.lora",
    "max_lora_rank": "policy.lora",
    "seed": "seed",
}
"""vLLM's engine arguments that rlsys sets -> the fields that they come from."""
VLLM_FIXED = {
    "hf_overrides": _MODEL,
    "logprobs_mode": "log-probs must be those of the distribution that is sampled from",
    "generation_config": "sampling settings are fields of rollout",
    "max_loras": _LORA,
    "max_cpu_loras": _LORA,
    "distributed_executor_backend": "Ray actors hold the engines, and vLLM's workers run below",
    "weight_transfer_config": _SYNC,
    "worker_extension_cls": _SYNC,
}
"""Those that rlsys sets, with the reason why they stay."""
VLLM_DEFAULTS = frozenset(
    {
        "disable_log_stats",
        "use_tqdm_on_load",
        "max_cudagraph_capture_size",
        "enforce_eager",
        "block_size",
        "max_num_batched_tokens",
        "enable_chunked_prefill",
    }
)
"""Those that rlsys sets and rollout.engine_kwargs may set differently."""
VLLM_REFUSED = {
    "tokenizer": "prompts are token ids of model.path's tokenizer",
    "override_generation_config": "sampling settings are fields of rollout",
    "pipeline_parallel_size": _ENGINES,
    "prefill_context_parallel_size": _ENGINES,
    "decode_context_parallel_size": _ENGINES,
    "data_parallel_size": _ENGINES,
    "nnodes": _ENGINES,
    "default_mm_loras": _LORA,
    "runner": "completions are generated",
    "convert": "completions are generated",
    "worker_cls": _SYNC,
    "model_class_overrides": _SYNC,
    "trust_remote_code": _CODE,
    "hf_token": "config.yaml would hold it, and the variable HF_TOKEN does the same",
}
"""Those that rlsys leaves alone and could not work with."""

MEGATRON_FIELDS = {
    "tensor_model_parallel_size": "policy.tensor_parallel_size, reference.tensor_parallel_size",
    "pipeline_model_parallel_size": "policy.pipeline_parallel_size",
    "pipeline_model_parallel_layout": "policy.pipeline_layout",
    "context_parallel_size": "policy.context_parallel_size, reference.context_parallel_size",
    "expert_model_parallel_size": "policy.expert_model_parallel_size",
    "sequence_parallel": "policy.tensor_parallel_size, reference.tensor_parallel_size",
    "attention_backend": "policy.attention_backend",
    "recompute_granularity": "policy.recompute",
    "recompute_method": "policy.recompute_method",
    "recompute_num_layers": "policy.recompute_num_layers",
    "recompute_modules": "policy.recompute_modules",
    "moe_router_load_balancing_type": "policy.moe_router_load_balancing_type",
    "moe_router_dtype": "policy.moe_router_dtype",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "use_cpu_initialization": "device",
    "lr": "policy.lr",
    "min_lr": "policy.min_lr",
    "weight_decay": "policy.weight_decay",
    "adam_beta1": "policy.adam_beta1",
    "adam_beta2": "policy.adam_beta2",
    "adam_eps": "policy.adam_eps",
    "clip_grad": "policy.max_grad_norm",
    "use_distributed_optimizer": "policy.use_distributed_optimizer",
    "use_precision_aware_optimizer": "policy.use_precision_aware_optimizer",
    "main_params_dtype": "policy.main_params_dtype",
    "main_grads_dtype": "policy.main_grads_dtype",
    "exp_avg_dtype": "policy.exp_avg_dtype",
    "exp_avg_sq_dtype": "policy.exp_avg_sq_dtype",
    "optimizer_cpu_offload": "policy.optimizer_cpu_offload",
    "optimizer_offload_fraction": "policy.optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d": "policy.overlap_cpu_optimizer_d2h_h2d",
    "fp8": "policy.fp8_format",
    "fp8_recipe": "policy.fp8_recipe",
    "fp8_param": "policy.fp8_param_gather",
    "fp8_param_gather": "policy.fp8_param_gather",
    "overlap_grad_reduce": "policy.overlap_grad_reduce",
    "overlap_param_gather": "policy.overlap_param_gather",
}
"""megatron-core's options that rlsys sets -> the fields that they come from."""
_OF_THE_MODEL = """
activation_func activation_func_clamp_value add_bias_linear add_qkv_bias
apply_residual_connection_post_layernorm attention_output_gate beta_fast beta_slow
experimental_attention_variant ffn_hidden_size gated_linear_unit glu_linear_offset
heterogeneous_block_specs hidden_size is_hybrid_model kv_channels kv_lora_rank layernorm_epsilon
layernorm_zero_centered_gamma linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
linear_num_key_heads linear_num_value_heads linear_value_head_dim moe_apply_probs_on_input
moe_ffn_hidden_size moe_latent_size moe_layer_freq
moe_router_enable_expert_bias moe_router_group_topk moe_router_num_groups moe_router_pre_softmax
moe_router_score_function moe_router_topk moe_router_topk_scaling_factor moe_shared_expert_gate
moe_shared_expert_intermediate_size mrope_section mscale mscale_all_dim multi_latent_attention
no_rope_freq normalization num_attention_heads num_layers num_moe_experts num_query_groups
original_max_position_embeddings q_lora_rank qk_head_dim qk_l2_norm qk_layernorm
qk_pos_emb_head_dim rope_type rotary_base rotary_interleaved rotary_percent rotary_scaling_factor
softmax_scale softmax_type v_head_dim window_attn_skip_freq window_size
"""
MEGATRON_MODEL = frozenset(_OF_THE_MODEL.split())
"""Those that describe the model: families set what theirs needs."""
MEGATRON_FIXED = {
    "attention_dropout": "log-probs of the update would be random",
    "hidden_dropout": "log-probs of the update would be random",
    "perform_initialization": "every weight is read from the model folder",
    "gradient_accumulation_fusion": _LOGPROBS,
    "expert_tensor_parallel_size": "experts are shared over ranks, not cut",
    "moe_router_bias_update_rate": "the biases by which experts are chosen stay as they are",
    "optimizer": "checkpoints and the memory estimate are for AdamW",
}
"""Those that rlsys sets, with the reason why they stay."""
MEGATRON_DEFAULTS = frozenset(
    {
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "batch_p2p_comm",
        "batch_p2p_sync",
        "moe_token_dispatcher_type",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "grad_reduce_in_fp32",
    }
)
"""Those that rlsys sets and policy.megatron_kwargs may set differently."""
_FSDP = "weights are read parameter by parameter, for checkpoints and weight sync"
_LAYOUT = "policy.pipeline_layout says which stage has which layers"
MEGATRON_REFUSED = {
    "virtual_pipeline_model_parallel_size": _LAYOUT,
    "num_layers_in_first_pipeline_stage": _LAYOUT,
    "num_layers_in_last_pipeline_stage": _LAYOUT,
    "account_for_embedding_in_pipeline_split": _LAYOUT,
    "account_for_loss_in_pipeline_split": _LAYOUT,
    "microbatch_group_size_per_vp_stage": "micro-batches are filled up to groups of the "
    "pipeline's size",
    "fp16": "model.dtype is float32 or bfloat16",
    "fp4_param": _FSDP,
    "use_megatron_fsdp": _FSDP,
    "use_custom_fsdp": _FSDP,
    "init_model_with_meta_device": _FSDP,
    "mtp_num_layers": "layers of multi-token prediction are not trained",
    "calculate_per_token_loss": "rlsys's loss has the denominators of the whole step already",
    "cross_entropy_loss_fusion": _LOGPROBS,
    "cross_entropy_fusion_impl": _LOGPROBS,
    "defer_embedding_wgrad_compute": _LOGPROBS,
    "overlap_param_gather_with_optimizer_step": "rlsys gathers weights at the end of an update",
    "moe_input_jitter_eps": "log-probs of the update would be random",
    "moe_aux_loss_coeff": "rlsys adds this loss itself, see policy.moe_aux_loss_coeff",
    "moe_z_loss_coeff": "rlsys adds this loss itself, see policy.moe_z_loss_coeff",
    "moe_enable_routing_replay": "rlsys replays routing itself, see rollout.router_replay",
}
"""Those that rlsys leaves alone and could not work with."""

VLLM = ("vllm", (("engine/arg_utils.py", "EngineArgs"),))
SPECULATION = ("vllm", (("config/speculative.py", "SpeculativeConfig"),))
MEGATRON = (
    "megatron.core",
    (
        ("transformer/transformer_config.py", "TransformerConfig"),
        ("transformer/transformer_config.py", "MLATransformerConfig"),
        ("model_parallel_config.py", "ModelParallelConfig"),
        ("optimizer/optimizer_config.py", "OptimizerConfig"),
        ("distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),
    ),
)
"""Package, and the files and classes with its options."""


def vllm_kwargs_problems(config: Config) -> Iterator[Problem]:
    """Options in engine_kwargs that rlsys sets itself, or cannot work with."""
    values, reasons = config.rollout.engine_kwargs, VLLM_FIXED | VLLM_REFUSED
    yield from _own_problems("rollout.engine_kwargs", values, VLLM_FIELDS, reasons)


def megatron_kwargs_problems(config: RunConfig) -> Iterator[Problem]:
    """The same for policy.megatron_kwargs."""
    reasons = MEGATRON_FIXED | MEGATRON_REFUSED | dict.fromkeys(MEGATRON_MODEL, _MODEL)
    values = config.policy.megatron_kwargs
    yield from _own_problems("policy.megatron_kwargs", values, MEGATRON_FIELDS, reasons)


def _own_problems(
    field: str, values: Mapping[str, Any], fields: Mapping[str, str], reasons: Mapping[str, str]
) -> Iterator[Problem]:
    for name in values:
        if name in fields:
            own = fields[name].replace(", ", " and ")
            yield Problem(f"{field}: rlsys sets {name} itself, from {own}: set that instead")
        elif name in reasons:
            yield Problem(f"{field}: {name} cannot be set, because {reasons[name]}: leave it out")


def vllm_option_problems(config: Config) -> list[Problem]:
    """Names in rollout.engine_kwargs that the installed vLLM does not have, and wrong types.

    The same for rollout.speculative_config. Where vLLM is not installed they are not checked, which
    is a problem of this machine only.
    """
    rollout = config.rollout
    return [
        *_library_problems("rollout.engine_kwargs", rollout.engine_kwargs, *VLLM),
        *_library_problems("rollout.speculative_config", rollout.speculation, *SPECULATION),
    ]


def megatron_option_problems(config: RunConfig) -> list[Problem]:
    """The same for policy.megatron_kwargs and megatron-core."""
    return _library_problems("policy.megatron_kwargs", config.policy.megatron_kwargs, *MEGATRON)


def _library_problems(
    field: str, values: Mapping[str, Any], package: str, sources: tuple[tuple[str, str], ...]
) -> list[Problem]:
    if not values:
        return []
    options = options_of(package, sources)
    if options is None:
        names = ", ".join(values)
        text = f"{field}: {package} is not installed here, so {names} could not be checked"
        return [Problem(text, only_here=True)]
    return option_problems(field, values, options, library=package)
