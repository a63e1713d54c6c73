"""Names of other projects behind `rlsys sft`: each has an answer, and means what it says there."""

import dataclasses
import re
from textwrap import dedent

import pytest

from rlsys.cli import main
from rlsys.config import Config, SftConfig
from rlsys.config.elsewhere import counterpart, counterparts, own_counterparts
from rlsys.config.fields import config_fields, show_value
from rlsys.config.hints import hint
from rlsys.config.load import load_config_as

MEGATRON_SWIFT_REFERENCE = """
micro_batch_size global_batch_size recompute_granularity recompute_method recompute_num_layers
recompute_modules deterministic_mode train_iters log_interval tensorboard_dir
no_masked_softmax_fusion no_bias_dropout_fusion no_bias_swiglu_fusion no_rope_fusion
no_gradient_accumulation_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl
calculate_per_token_loss attention_backend optimizer optimizer_cpu_offload
optimizer_offload_fraction use_precision_aware_optimizer main_grads_dtype main_params_dtype
exp_avg_dtype exp_avg_sq_dtype dataloader_type manual_gc manual_gc_interval seed num_workers
use_cpu_initialization extra_megatron_kwargs lr lr_decay_style lr_decay_iters lr_warmup_iters
lr_warmup_fraction min_lr weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum save
save_interval no_save_optim no_save_rng load no_load_optim no_load_rng finetune ckpt_format
no_initialization auto_detect_ckpt_format exit_on_missing_checkpoint distributed_backend
use_distributed_optimizer tensor_model_parallel_size pipeline_model_parallel_size
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers sequence_parallel
context_parallel_size tp_comm_overlap overlap_grad_reduce overlap_param_gather
distributed_timeout_minutes log_params_norm log_throughput tensorboard_log_interval
tensorboard_queue_size log_timers_to_tensorboard no_log_learning_rate_to_tensorboard
log_validation_ppl_to_tensorboard log_memory_to_tensorboard logging_level wandb_project
wandb_exp_name wandb_save_dir eval_iters eval_interval fp8_format fp8_recipe fp8_amax_history_len
fp8_amax_compute_algo fp8_param_gather fp16 bf16 apply_query_key_layer_scaling
attention_softmax_in_fp32 num_layers hidden_size ffn_hidden_size num_attention_heads
group_query_attention num_query_groups max_position_embeddings position_embedding_type rotary_base
rotary_percent normalization norm_epsilon swiglu untie_embeddings_and_output_weights
disable_bias_linear add_qkv_bias attention_dropout hidden_dropout kv_channels qk_layernorm
transformer_impl padded_vocab_size rope_scaling num_experts moe_layer_freq moe_ffn_hidden_size
moe_shared_expert_intermediate_size moe_router_topk moe_router_pre_softmax moe_router_dtype
moe_router_score_function moe_router_bias_update_rate moe_router_enable_expert_bias
moe_router_topk_scaling_factor moe_router_load_balancing_type expert_model_parallel_size
moe_token_dispatcher_type moe_enable_deepep moe_grouped_gemm moe_permute_fusion moe_aux_loss_coeff
moe_z_loss_coeff moe_expert_capacity_factor moe_shared_expert_overlap moe_token_drop_policy
multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim train_type
freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters
trainable_parameters_regex adapter_load target_modules target_regex modules_to_save lora_rank
lora_alpha lora_dropout lora_bias use_rslora ref_load beta rpo_alpha reference_free
label_smoothing f_divergence_type loss_type add_version padding_free mlp_padding_free packing
packing_cache streaming lazy_tokenize max_epochs rlhf_type loss_scale seq_length
"""
"""Every argument of `megatron sft`, `pt` and `rlhf` in Megatron-SWIFT's command-line reference."""

MEGATRON_SFT = """
NPROC_PER_NODE=2 CUDA_VISIBLE_DEVICES=0,1 megatron sft --load Qwen2.5-7B-Instruct-mcore --dataset
AI-ModelScope/alpaca-gpt4-data-zh#500 swift/self-cognition#500 --train_type lora --lora_rank 8
--lora_alpha 32 --target_modules all-linear --tensor_model_parallel_size 2 --sequence_parallel true
--micro_batch_size 16 --global_batch_size 16 --recompute_granularity full --recompute_method
uniform --recompute_num_layers 1 --finetune true --cross_entropy_loss_fusion true --lr 1e-4
--lr_warmup_fraction 0.05 --min_lr 1e-5 --max_epochs 1 --save megatron_output/Qwen2.5-7B-Instruct
--save_interval 100 --max_length 2048 --system helpful --num_workers 4 --no_save_optim true
--no_save_rng true --dataset_num_proc 4 --model_author swift --model_name swift-robot
"""

SWIFT_SFT = """
swift sft --model Qwen/Qwen2.5-7B-Instruct --train_type lora --dataset a.jsonl b.jsonl#500
--torch_dtype bfloat16 --num_train_epochs 1 --per_device_train_batch_size 1
--per_device_eval_batch_size 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 --target_modules
all-linear --gradient_accumulation_steps 16 --eval_steps 50 --save_steps 50 --save_total_limit 2
--logging_steps 5 --max_length 2048 --output_dir output --system helpful --warmup_ratio 0.05
--dataloader_num_workers 4 --model_author swift --model_name swift-robot
"""

TRL_SFT = """
trl sft --model_name_or_path Qwen/Qwen2-0.5B --dataset_name trl-lib/Capybara --learning_rate 2e-4
--num_train_epochs 1 --packing --per_device_train_batch_size 2 --gradient_accumulation_steps 8
--gradient_checkpointing --eos_token <|im_end|> --eval_strategy steps --eval_steps 100 --use_peft
--lora_r 32 --lora_alpha 16 --output_dir Qwen2-0.5B-SFT --push_to_hub
"""


def names_of(command):
    return [word[2:] for word in command.split() if word.startswith("--")]


def test_every_flag_of_megatron_swifts_reference_has_an_answer():
    fields = config_fields(SftConfig)
    for name in MEGATRON_SWIFT_REFERENCE.split():
        row = counterpart(name, "ms-swift", SftConfig)
        assert row is not None, name
        assert row.fields or row.note, name
        assert set(row.fields) <= set(fields), name


@pytest.mark.parametrize("schema", [Config, SftConfig])
def test_the_tables_are_about_fields_that_there_are(schema):
    fields = config_fields(schema)
    for row in counterparts(schema):
        assert set(row.fields) <= set(fields), row
        assert row.fields or row.note, row
    names = [(row.project, name) for row in counterparts(schema) for name in row.names]
    assert len(names) == len(set(names))


def test_the_table_of_sft_is_about_what_differs():
    for row in own_counterparts(SftConfig):
        for name in row.names:
            first = counterpart(name, row.project, Config)
            same = first is not None and (
                (first.fields, first.default, first.note) == (row.fields, row.default, row.note)
            )
            assert not same, f"{row.project}: {name} says the same in both tables"


def test_every_field_of_trls_config_is_in_the_table():
    from trl import ModelConfig, ScriptArguments, SFTConfig

    rows = {n: r for r in counterparts(SftConfig) if r.project == "TRL" for n in r.names}
    kinds = (ScriptArguments, ModelConfig, SFTConfig)
    theirs = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    assert sorted(set(theirs) - set(rows)) == []
    for name, field in theirs.items():
        if rows[name].default:
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            assert rows[name].default == show_value(default), name


@pytest.mark.parametrize(
    ("command", "project"),
    [(MEGATRON_SFT, "ms-swift"), (SWIFT_SFT, "ms-swift"), (TRL_SFT, "TRL")],
)
def test_a_pasted_command_is_answered_flag_by_flag_and_translated(
    command, project, capsys, tmp_path
):
    with pytest.raises(SystemExit, match="2"):
        main(["sft", *command.split()])
    error = capsys.readouterr().err
    assert "leave it out, `rlsys` is the program" in error
    for name in names_of(command):
        if name not in config_fields(SftConfig):
            assert f"  - --{name}: " in error, name
    assert "-> rollout." not in error
    assert f"These are names of {project}: docs/migration.md" in error
    text = error.partition("to start from and to check:\n\n")[2]
    text = re.split("Still to set: |Not translated: ", text)[0]
    path = tmp_path / "start.yaml"
    path.write_text(dedent(text))
    options = ["--eval_steps", "null"]  # of a dataset whose own split is held out there
    options += [] if "output_dir" in text else ["--output_dir", "runs/a"]
    options += [] if "path:" in text else ["--model.path", "m"]
    config = load_config_as(SftConfig, path, options).config
    assert config.num_train_epochs == 1
    assert config.policy.lr in (1e-4, 2e-4)


def test_a_flag_of_grpo_behind_sft_says_where_it_belongs():
    says = hint("num_generations", "ms-swift", SftConfig)
    assert says == " Not needed: rollout.num_generations is for `rlsys grpo`."
