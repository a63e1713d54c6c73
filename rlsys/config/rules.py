"""Rules between config fields: values that are each valid, but not together.

A rule's text names the fields that it reads, their values, and what to do. Where one of these
fields has a mistake of its own, the rule is not reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.algorithm import CLIPPED_LOSSES
from rlsys.config.passed_through import megatron_kwargs_problems, vllm_kwargs_problems
from rlsys.config.pipeline_layout import layout_problems
from rlsys.config.prompt_template import prompt_template_problems
from rlsys.config.rules_adapters import adapter_rules
from rlsys.config.rules_algorithm import algorithm_problems
from rlsys.config.rules_checkpoint import checkpoint_problems
from rlsys.config.rules_colocated import placement_rules
from rlsys.config.rules_eval import eval_problems, held_out_problems
from rlsys.config.rules_memory import memory_rule_problems
from rlsys.config.rules_profile import profile_problems
from rlsys.config.rules_reward import learning_problems, reward_problems
from rlsys.config.rules_speculation import speculation_problems
from rlsys.config.rules_teacher import teacher_problems
from rlsys.config.rules_trained import trained_rule_problems
from rlsys.problems import Problem
from rlsys.text import counted, near_divisors, near_multiples

if TYPE_CHECKING:
    from rlsys.config.preference import PreferenceConfig
    from rlsys.config.schema import Config, DataConfig, RowsConfig, RunConfig


OWN_TEMPLATE_ARGUMENTS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""Arguments of transformers' `apply_chat_template` that are not variables of the template."""


def cross_field_problems(config: Config) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *run_problems(config),
        *rows_problems(config.data),
        *_prompt_problems(config.data),
        *_batch_problems(config),
        *(() if config.reference_is_base else _reference_problems(config)),
        *teacher_problems(config),
        *adapter_rules(config),
        *_clip_problems(config),
        *learning_problems(config.reward, has_teacher=config.used_teacher is not None),
        *reward_problems(config.reward),
        *eval_problems(config),
        *algorithm_problems(config),
        *_engine_problems(config),
        *placement_rules(config),
        *speculation_problems(config.rollout),
        *_staleness_problems(config),
        *_dynamic_sample_problems(config),
        *vllm_kwargs_problems(config),
    ]


def run_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule that a config of any method breaks, without those of its data."""
    yield from _length_problems(config)
    yield from held_out_problems(config)
    yield from _policy_rank_problems(config)
    yield from _training_problems(config)
    yield from memory_rule_problems(config.policy)
    yield from trained_rule_problems(config.policy)
    yield from megatron_kwargs_problems(config)
    yield from layout_problems(config.policy)


# --- steps, batches and ranks --------------------------------------------------------------------


def _length_problems(config: RunConfig) -> Iterator[Problem]:
    if config.max_steps is not None:
        return
    if config.num_train_epochs is None:
        yield Problem("max_steps: is missing, and so is num_train_epochs: set one of them")
    elif config.data.streaming:
        yield Problem(
            f"num_train_epochs = {config.num_train_epochs:g} needs the number of rows, which "
            "data.streaming does not know: set max_steps, or do not stream"
        )


def _batch_problems(config: Config) -> Iterator[Problem]:
    rollout, step = config.rollout, config.global_batch_size
    completions, group_size = rollout.generation_batch_size, rollout.num_generations
    if completions % group_size:
        yield Problem(
            f"rollout.generation_batch_size = {completions} is not a multiple of "
            f"rollout.num_generations = {group_size}, the completions per prompt: use "
            f"{near_multiples(completions, group_size)}"
        )
    elif (prompts := config.num_prompts + config.num_prompts_ahead) < rollout.num_engines:
        ahead = f" + {config.num_prompts_ahead} ahead" if config.num_prompts_ahead else ""
        yield Problem(
            f"rollout.num_engines = {rollout.num_engines} is more than the {prompts} prompts a "
            f"step (generation_batch_size {completions} / num_generations {group_size}{ahead}), "
            f"so some engines would idle: use at most {prompts} engines, or more prompts"
        )
    if completions % step:
        yield Problem(
            f"policy.global_batch_size = {step} does not divide rollout.generation_batch_size = "
            f"{completions}, and a rollout is a whole number of optimizer steps: use "
            f"{near_divisors(step, completions)}"
        )
    tokens, longest = config.policy.max_tokens_per_micro_batch, config.longest_row
    if tokens is not None and tokens < longest:
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {tokens} does not hold the longest row, "
            f"{config.longest_row_is} = {longest} tokens: use {longest} or more, or lower these"
        )


def _policy_rank_problems(config: RunConfig) -> Iterator[Problem]:
    policy, ranks = config.policy, config.policy.world_size
    step = config.global_batch_size // config.rows_together
    tp, pp = policy.tensor_parallel_size, policy.pipeline_parallel_size
    cp, ep = policy.context_parallel_size, policy.expert_model_parallel_size
    if ranks % (tp * pp * cp):
        yield Problem(
            f"policy.world_size = {ranks} is not a multiple of tensor_parallel_size {tp} x "
            f"pipeline_parallel_size {pp} x context_parallel_size {cp} = {tp * pp * cp}: use "
            f"{near_multiples(ranks, tp * pp * cp)} ranks"
        )
    elif step % config.data_parallel_size:
        name = "policy.global_batch_size"
        if policy.global_batch_size is None:
            name = f"{config.default_batch_size} (which {name} defaults to)"
        yield Problem(
            f"{name} = {step} cannot be shared equally among {config.data_parallel_size} "
            f"data-parallel ranks (world_size {ranks} / (tensor_parallel_size {tp} x "
            f"pipeline_parallel_size {pp} x context_parallel_size {cp})): use "
            f"{near_multiples(step, config.data_parallel_size)}, or another number of ranks"
        )
    if ranks % pp == 0 and (ranks // pp) % ep:
        yield Problem(
            f"policy.expert_model_parallel_size = {ep} does not divide the {ranks // pp} ranks "
            f"that hold a layer (policy.world_size {ranks} / pipeline_parallel_size {pp}): use a "
            "number that does"
        )
    widest = config.largest_context_parallel_size
    if widest > 1 and policy.attention_backend == "unfused":
        yield Problem(
            f"policy.attention_backend = unfused cannot work with context_parallel_size = {widest} "
            "(of the policy, the reference or the teacher): use auto, fused or flash"
        )


def _reference_problems(config: Config) -> Iterator[Problem]:
    reference, beta = config.reference, config.grpo.beta
    if reference.sync_steps is not None and beta == 0:
        yield Problem(
            f"reference.sync_steps = {reference.sync_steps}, but with grpo.beta = 0 there is no "
            "reference: set grpo.beta, or leave sync_steps out"
        )
    if reference.mixup_alpha != 1 and reference.sync_steps is None:
        yield Problem(
            f"reference.mixup_alpha = {reference.mixup_alpha:g} is for the copies of "
            "reference.sync_steps, and that is null: set it, or leave mixup_alpha out"
        )
    rows = config.rollout.generation_batch_size
    yield from reference_rank_problems(config, rows, "rollout.generation_batch_size")


def reference_rank_problems(
    config: Config | PreferenceConfig, num_rows: int, rows_are: str
) -> Iterator[Problem]:
    """Rules about the ranks of a reference that is a model of its own, given the rows of a step."""
    reference, policy_ranks = config.reference, config.policy.world_size
    tp, cp = reference.tensor_parallel_size, reference.context_parallel_size
    if reference.world_size % (tp * cp):
        yield Problem(
            f"reference.world_size = {reference.world_size} is not a multiple of "
            f"reference.tensor_parallel_size {tp} x context_parallel_size {cp} = {tp * cp}: use "
            f"{near_multiples(reference.world_size, tp * cp)} ranks"
        )
    elif config.has_reference_model and reference.num_replicas > num_rows:
        yield Problem(
            f"reference.world_size = {reference.world_size} makes {reference.num_replicas} "
            f"replicas, and a step has {num_rows} rows for them ({rows_are}): use at most "
            f"{num_rows * tp * cp} ranks, or more rows"
        )
    shares = config.has_reference_model and reference.placement == "policy"
    if shares and reference.world_size > policy_ranks:
        yield Problem(
            f"reference.world_size = {reference.world_size} is more than the policy's ranks, "
            f"policy.world_size = {policy_ranks}, whose GPUs it shares (reference.placement = "
            "policy): lower it, or set reference.placement to own"
        )


def _clip_problems(config: Config) -> Iterator[Problem]:
    epsilon, _ = config.grpo.epsilons
    if epsilon >= 1 and config.grpo.loss_type in CLIPPED_LOSSES:
        name = "epsilon" if config.grpo.epsilon_low is None else "epsilon_low"
        yield Problem(
            f"grpo.{name} = {epsilon:g} puts the lower clip bound at {1 - epsilon:g}, and a ratio "
            "of probabilities is above 0: use a value below 1, such as 0.2 (grpo.epsilon_high may "
            "be larger)"
        )


def _training_problems(config: RunConfig) -> Iterator[Problem]:
    policy = config.policy
    if policy.min_lr > policy.lr:
        yield Problem(
            f"policy.min_lr = {policy.min_lr:g} is above policy.lr = {policy.lr:g}, where the "
            "decay starts: lower min_lr or raise lr"
        )
    if policy.overlap_param_gather and not policy.use_distributed_optimizer:
        yield Problem(
            "policy.overlap_param_gather gathers weights that policy.use_distributed_optimizer "
            "shards, and that is false: set it to true, or leave overlap_param_gather out"
        )
    if policy.overlap_param_gather and not policy.overlap_grad_reduce:
        yield Problem(
            "policy.overlap_param_gather needs policy.overlap_grad_reduce, whose buckets it "
            "gathers: set that to true as well, or leave overlap_param_gather out"
        )
    if config.checkpoint.resume and policy.optimizer_cpu_offload:
        yield Problem(
            "checkpoint.resume with policy.optimizer_cpu_offload would start from wrong weights: "
            "megatron-core (0.19) does not give its state in host memory what a checkpoint holds. "
            "Continue with optimizer_cpu_offload false, or start a new run from the checkpoint's "
            "weights (model.path)"
        )
    yield from checkpoint_problems(config)
    yield from profile_problems(config)


# --- data ----------------------------------------------------------------------------------------


def rows_problems(data: RowsConfig) -> Iterator[Problem]:
    """Every rule about reading rows that `data` breaks."""
    yield from _split_problems(data)
    yield from _dataset_problems(data)
    yield from prompt_template_problems(data)


def _split_problems(data: RowsConfig) -> Iterator[Problem]:
    share = data.split_dataset_ratio
    if data.val_dataset and share:
        yield Problem(
            f"data.val_dataset and data.split_dataset_ratio = {share:g} both say what is held "
            "out: leave one of them out"
        )
    if data.streaming and share:
        yield Problem(
            f"data.split_dataset_ratio = {share:g} needs all rows at once, which data.streaming "
            "does not have: set data.val_dataset, or do not stream"
        )
    if data.streaming and data.deduplicate:
        yield Problem(
            "data.deduplicate needs all rows at once, which data.streaming does not have: remove "
            "duplicates from the files, or do not stream"
        )


def _dataset_problems(data: RowsConfig) -> Iterator[Problem]:
    if data.dataset_weights is not None and len(data.dataset_weights) != len(data.dataset):
        yield Problem(
            f"data.dataset_weights has {counted(len(data.dataset_weights), 'value')} for "
            f"{counted(len(data.dataset), 'dataset')} ({', '.join(data.dataset)}) in data.dataset: "
            "give one weight for each, or leave it out to take every row once an epoch"
        )
    for name, preprocessors, datasets in (
        ("", data.preprocessor, data.dataset),
        ("val_", data.val_preprocessor, data.val_dataset),
    ):
        if len(preprocessors) > 1 and len(preprocessors) != len(datasets):
            yield Problem(
                f"data.{name}preprocessor has {counted(len(preprocessors), 'name')} for "
                f"{counted(len(datasets), 'dataset')} in data.{name}dataset: give one for all, or "
                "one for each (none leaves rows as they are)"
            )
    if data.val_dataset and len(data.preprocessor) > 1 and not data.val_preprocessor:
        yield Problem(
            "data.preprocessor has one name for each of data.dataset, which says nothing about "
            "data.val_dataset: set data.val_preprocessor (none leaves rows as they are)"
        )
    taken = sorted(set(data.chat_template_kwargs) & set(OWN_TEMPLATE_ARGUMENTS))
    if taken:
        yield Problem(
            f"data.chat_template_kwargs has {', '.join(taken)}, which rlsys sets itself: leave it "
            "out; it is for variables that the template reads, such as enable_thinking"
        )


def _prompt_problems(data: DataConfig) -> Iterator[Problem]:
    if data.min_prompt_length > data.max_prompt_length:
        yield Problem(
            f"data.min_prompt_length = {data.min_prompt_length} is above data.max_prompt_length = "
            f"{data.max_prompt_length}, so no prompt fits: lower one or raise the other"
        )


# --- rollouts ------------------------------------------------------------------------------------


def _engine_problems(config: Config) -> Iterator[Problem]:
    rollout, sharing = config.rollout, config.rollout.engines_per_gpu
    if rollout.num_engines % sharing:
        yield Problem(
            f"rollout.num_engines = {rollout.num_engines} is not a multiple of "
            f"rollout.engines_per_gpu = {sharing}, and all GPUs must hold equally many: use "
            f"{near_multiples(rollout.num_engines, sharing)} engines"
        )
    if sharing > 1 and rollout.tensor_parallel_size > 1:
        yield Problem(
            f"rollout.engines_per_gpu = {sharing} is for engines on one GPU, and "
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: set one of them to 1"
        )


def _staleness_problems(config: Config) -> Iterator[Problem]:
    staleness, ahead = config.rollout.max_staleness, config.rollout.oversample_prompts
    if not staleness:
        if config.rollout.in_flight_kv == "keep":
            yield Problem(
                "rollout.in_flight_kv = keep has no effect with rollout.max_staleness = 0, where "
                "no completion is unfinished when weights change: leave it out, or set "
                "max_staleness to 1 or more"
            )
        return
    most = staleness * config.num_prompts
    if ahead == 0:
        yield Problem(
            f"rollout.max_staleness = {staleness} with rollout.oversample_prompts = 0 leaves "
            "nothing to sample while the policy is updated: leave oversample_prompts out, or set "
            "max_staleness to 0"
        )
    elif ahead is not None and ahead > most:
        yield Problem(
            f"rollout.oversample_prompts = {ahead} is more than the {most} prompts that "
            f"{staleness} further batches of {config.num_prompts} can hold, so some would get "
            f"staler than rollout.max_staleness: use at most {most}, or a larger max_staleness"
        )
    if config.grpo.old_logprobs == "rollout":
        yield Problem(
            f"grpo.old_logprobs = rollout with rollout.max_staleness = {staleness} would clip "
            "against policies of several updates ago, and count what those updates changed as "
            "this one's: use old_logprobs auto, which clips against the policy before this update "
            "and corrects for staleness with grpo.rollout_is"
        )


def _dynamic_sample_problems(config: Config) -> Iterator[Problem]:
    rollout, grpo = config.rollout, config.grpo
    default = type(rollout).model_fields["max_resample_times"].default
    if not rollout.dynamic_sample:
        if rollout.max_resample_times != default:
            yield Problem(
                f"rollout.max_resample_times = {rollout.max_resample_times} has no effect without "
                "rollout.dynamic_sample: set that, or leave it out"
            )
        return
    if grpo.advantage_estimator == "reinforce_plus_plus":
        yield Problem(
            "rollout.dynamic_sample replaces groups whose rewards are all equal because they teach "
            "nothing, but grpo.advantage_estimator = reinforce_plus_plus learns from them: it "
            "compares over the batch and not within groups. Leave dynamic_sample out, or use "
            "another estimator, such as grpo"
        )
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        yield Problem(
            "rollout.dynamic_sample looks at total rewards, but with "
            "grpo.multi_objective_aggregation = normalize_then_sum a group with equal totals still "
            "teaches something where its reward functions differ. Leave dynamic_sample out, or use "
            "sum_then_normalize"
        )
