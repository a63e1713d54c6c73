"""What an unknown name in a config may mean: another project's name, or a misspelt one of ours.

A wrong hint changes what is trained, so a name that is not clearly one of them gets none.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rlsys.config_fields import config_fields, config_sections, first_sentence

NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "checkpoint.resume": (
        *("load_checkpoint", "resume_from_checkpoint", "resume_from_path", "resume_mode"),
    ),
    "checkpoint.save_steps": ("save_freq", "save_interval"),
    "checkpoint.save_total_limit": ("max_actor_ckpt_to_keep", "max_ckpt_num"),
    "data.columns": ("input_key", "label_key", "prompt_key"),
    "data.dataset": (
        *("data_path", "dataset_name", "prompt_data", "train_data", "train_dataset"),
        *("train_file", "train_files"),
    ),
    "data.dataset_weights": ("interleave_prob", "prompt_data_probs"),
    "data.external_plugins": ("custom_register_path",),
    "data.max_prompt_length": ("max_prompt_len", "prompt_length", "prompt_max_len"),
    "data.overlong_prompts": ("filter_overlong_prompts", "truncation", "truncation_strategy"),
    "data.shuffle": ("dataset_shuffle", "shuffle_dataset"),
    "data.system": ("system_prompt",),
    "data.val_dataset": ("eval_data", "eval_dataset", "test_files", "val_data", "val_files"),
    "eval_steps": ("eval_freq", "eval_interval", "test_freq"),
    "grpo.advantage_estimator": ("adv_estimator",),
    "grpo.beta": (
        *("init_kl_coef", "kl_beta", "kl_coef", "kl_coeff", "kl_loss_coef", "use_kl_loss"),
    ),
    "grpo.delta": ("clip_ratio_c", "dual_clip"),
    "grpo.entropy_coef": ("entropy_coeff", "entropy_loss_coef"),
    "grpo.epsilon": (
        *("clip_range", "clip_ratio", "clip_ratio_low", "cliprange", "cliprange_low"),
        *("eps_clip", "eps_clip_low_high", "epsilon_low"),
    ),
    "grpo.epsilon_high": (
        *("clip_ratio_high", "cliprange_high", "eps_clip_high", "eps_clip_low_high"),
    ),
    "grpo.kl_estimator": ("kl_loss_type", "kl_penalty"),
    "grpo.kl_in_reward": ("use_kl_in_reward",),
    "grpo.loss_aggregation": ("loss_agg_mode",),
    "grpo.loss_type": ("loss_mode", "policy_loss_type"),
    "grpo.mask_truncated_completions": ("overlong_filter",),
    "grpo.num_iterations": ("max_epochs", "num_ppo_epochs", "ppo_epochs"),
    "grpo.rollout_is": (
        *("enable_vllm_is_correction", "rollout_importance_sampling_mode"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    ),
    "grpo.rollout_is_threshold": (
        *("rollout_importance_sampling_threshold", "vllm_importance_sampling_cap"),
        *("vllm_importance_sampling_clip_max", "vllm_is_truncated_threshold"),
    ),
    "grpo.scale_rewards": ("no_advantage_std_norm", "norm_adv_by_std_in_grpo"),
    "max_steps": (
        *("epochs", "num_episodes", "num_epochs", "num_train_epochs", "total_epochs"),
        *("total_steps", "total_training_steps"),
    ),
    "model.dtype": ("bf16", "fp16", "torch_dtype"),
    "model.path": (
        *("model", "model_id", "model_name", "model_name_or_path", "model_path", "pretrain"),
    ),
    "output_dir": ("default_local_dir", "save_path"),
    "policy.adam_beta1": ("adam_betas", "betas"),
    "policy.adam_beta2": ("adam_betas", "betas"),
    "policy.adam_eps": ("adam_epsilon",),
    "policy.attention_backend": ("attn_impl", "attn_implementation"),
    "policy.context_parallel_size": (
        *("ring_attn_size", "sequence_parallel_size", "ulysses_sequence_parallel_size"),
    ),
    "policy.global_batch_size": (
        *("gradient_accumulation_steps", "mini_batch_size", "ppo_mini_batch_size"),
        *("steps_per_generation", "train_batch_size"),
    ),
    "policy.lr": ("actor_learning_rate", "learning_rate"),
    "policy.lr_scheduler_type": ("lr_scheduler", "warmup_style"),
    "policy.max_grad_norm": ("clip_grad", "grad_clip", "gradient_clipping", "max_norm"),
    "policy.max_tokens_per_micro_batch": (
        *("ppo_max_token_len_per_gpu", "train_max_tokens_per_gpu"),
        *("use_dynamic_batch", "use_dynamic_bsz"),
    ),
    "policy.micro_batch_size": (
        *("micro_batch_size_per_gpu", "micro_train_batch_size", "per_device_train_batch_size"),
        *("ppo_micro_batch_size", "ppo_micro_batch_size_per_gpu"),
    ),
    "policy.min_lr": ("min_lr_ratio",),
    "policy.pipeline_parallel_size": ("pipeline_model_parallel_size",),
    "policy.recompute": (
        *("enable_gradient_checkpointing", "gradient_checkpointing", "recompute_granularity"),
    ),
    "policy.tensor_parallel_size": ("tensor_model_parallel_size",),
    "policy.warmup_ratio": (
        *("lr_warmup_ratio", "lr_warmup_steps", "lr_warmup_steps_ratio", "warmup_steps"),
    ),
    "policy.weight_decay": ("l2",),
    "policy.world_size": (
        *("actor_num_gpus_per_node", "n_gpus_per_node", "nproc_per_node", "num_gpus"),
    ),
    "reference.mixup_alpha": ("ref_model_mixup_alpha",),
    "reference.path": ("ref_model",),
    "reference.sync_steps": ("ref_model_sync_steps", "sync_ref_model"),
    "reward.reward_funcs": ("custom_reward_function", "reward_fn", "reward_functions"),
    "reward.reward_model": ("reward_pretrain",),
    "rollout.dynamic_sample": ("dynamic_filtering", "filter_groups"),
    "rollout.generation_batch_size": ("gen_batch_size", "rollout_batch_size", "train_batch_size"),
    "rollout.gpu_memory_utilization": ("vllm_gpu_memory_utilization",),
    "rollout.max_completion_length": (
        *("completion_length", "generate_max_len", "max_completion_tokens", "max_new_tokens"),
        *("max_response_len", "max_response_length", "max_tokens", "response_length"),
    ),
    "rollout.max_num_seqs": ("vllm_max_num_seqs",),
    "rollout.max_staleness": ("async_queue_size", "async_train"),
    "rollout.num_engines": ("vllm_num_engines",),
    "rollout.num_generations": (
        *("group_size", "n", "n_samples_per_prompt", "num_generations_per_prompt"),
        *("num_return_sequences", "rollout_n"),
    ),
    "rollout.tensor_parallel_size": ("tensor_model_parallel_size", "vllm_tensor_parallel_size"),
    "seed": ("data_seed",),
    "tracking.report_to": (*("log_with", "logger", "logging", "use_tensorboard", "use_wandb"),),
    "tracking.run_name": ("experiment_name", "wandb_run_name"),
    "tracking.wandb_project": ("project_name",),
}
"""Our field -> what TRL's GRPOConfig, ms-swift's GRPO, verl or OpenRLHF call it, or what does there
what this field does here; units may differ. What has no counterpart, such as LoRA, is not here."""

LEAST_LIKE = 0.8
"""Similarity of each word of a misspelt name to the right one: lrr is lr, and max is not min."""


def fields_of_elsewhere(name: str) -> list[str]:
    """The fields that stand for another project's `name`; those of the section it names if any."""
    own = _bare(name)
    found = [field for field, names in NAMES_ELSEWHERE.items() if own in names]
    return _of_section(name, found)


def nearest_fields(name: str, known: Sequence[str]) -> list[str]:
    """Those of `known` fields that `name` is without its section, or else misspells; often none."""
    own = _bare(name)
    same = [field for field in known if _bare(field) == own]
    if same:
        return same
    near = {field: _likeness(own, _bare(field)) for field in known}
    best = max(near.values())
    return _of_section(name, [field for field in known if near[field] == best]) if best else []


def _bare(name: str) -> str:
    return name.rpartition(".")[2].replace("-", "_").lower()


def _of_section(name: str, fields: list[str]) -> list[str]:
    section = name.rpartition(".")[0]
    return [field for field in fields if field.rpartition(".")[0] == section] or fields


def _likeness(name: str, known: str) -> float:
    """From 0, another name, to 1: word by word, since long words in common hide a short one."""
    if name.replace("_", "") == known.replace("_", ""):
        return 1.0
    words, others = name.split("_"), known.split("_")
    if len(words) != len(others):
        return 0.0
    pairs = zip(words, others, strict=True)
    likeness = [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]
    return sum(likeness) / len(words) if min(likeness) >= LEAST_LIKE else 0.0


def hint(name: str) -> str:
    """A hint, "Did you mean ...?", for a name that no field has; empty unless one is clear."""
    fields = config_fields()
    known = [*fields, *([] if "." in name else config_sections())]
    elsewhere = fields_of_elsewhere(name)
    meant = elsewhere or nearest_fields(name, known)
    if not meant:
        return ""
    text = f" Did you mean {' or '.join(map(repr, meant))}?"
    # Another project may count something else.
    if len(elsewhere) == 1:
        return f"{text} {first_sentence(fields[meant[0]].description)}"
    meanings = (f" {field}: {first_sentence(fields[field].description)}" for field in elsewhere)
    return text + "".join(meanings)
