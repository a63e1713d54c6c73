"""Rules between config fields: numbers that are each valid, but not together.

Every message names the fields, the numbers and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.algorithm import CLIPPED_LOSSES
from rlsys.config.gates import parse_gate
from rlsys.config.rules_algorithm import algorithm_problems
from rlsys.config.rules_parallel import parallelism_problems
from rlsys.problems import Problem
from rlsys.text import counted, near_divisors, near_multiples

if TYPE_CHECKING:
    from rlsys.config.schema import Config, RewardConfig


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
"""Arguments of transformers' `apply_chat_template` that are no variables of the template."""


def cross_field_problems(config: Config) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *_length_problems(config),
        *_batch_problems(config),
        *parallelism_problems(config),
        *reward_problems(config.reward),
        *_optimizer_problems(config),
        *_data_problems(config),
        *_dataset_problems(config),
        *algorithm_problems(config),
        *_rollout_problems(config),
    ]


def _length_problems(config: Config) -> Iterator[Problem]:
    if config.max_steps is not None:
        return
    if config.num_train_epochs is None:
        yield Problem(
            "max_steps: is missing, and num_train_epochs is too: set one of them to say how long "
            "the run is",
            ("max_steps", "num_train_epochs"),
        )
    elif config.data.streaming:
        yield Problem(
            f"num_train_epochs = {config.num_train_epochs:g} needs the number of rows, which "
            "data.streaming does not know: set max_steps, or do not stream",
            ("num_train_epochs", "data.streaming", "max_steps"),
        )


def _batch_problems(config: Config) -> Iterator[Problem]:
    rollout, policy = config.rollout, config.policy
    completions, group = rollout.generation_batch_size, rollout.num_generations
    if completions % group:
        yield Problem(
            f"rollout.generation_batch_size = {completions} is not a multiple of "
            f"rollout.num_generations = {group}, so it is no whole number of prompts: use "
            f"{near_multiples(completions, group)}",
            ("rollout.generation_batch_size", "rollout.num_generations"),
        )
    elif (prompts := config.num_prompts + config.num_prompts_ahead) < rollout.num_engines:
        ahead = f" + {config.num_prompts_ahead} ahead" if config.num_prompts_ahead else ""
        yield Problem(
            f"rollout.num_engines = {rollout.num_engines} is more than the {prompts} "
            f"prompts a step (generation_batch_size {completions} / num_generations {group}"
            f"{ahead}), so some would idle: use at most {prompts} engines, or more prompts",
            ("rollout.num_engines", "rollout.generation_batch_size", "rollout.num_generations"),
        )
    step = config.global_batch_size
    if completions % step:
        yield Problem(
            f"policy.global_batch_size = {step} does not divide rollout.generation_batch_size = "
            f"{completions}, so a rollout is no whole number of optimizer steps: use "
            f"{near_divisors(step, completions)}",
            ("policy.global_batch_size", "rollout.generation_batch_size"),
        )
    prompt, completion = config.data.max_prompt_length, rollout.max_completion_length
    budget = policy.max_tokens_per_micro_batch
    if budget is not None and budget < prompt + completion:
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {budget} does not hold the longest row, "
            f"{prompt + completion} tokens (data.max_prompt_length {prompt} + "
            f"rollout.max_completion_length {completion}): use {prompt + completion} or more",
            (
                "policy.max_tokens_per_micro_batch",
                "data.max_prompt_length",
                "rollout.max_completion_length",
            ),
        )


def reward_problems(reward: RewardConfig) -> Iterator[Problem]:
    """What does not go together in the reward section of a config."""
    names, weights = reward.names, reward.reward_weights
    if not names:
        yield Problem(
            "reward.reward_funcs: nothing scores the completions: name a function (`rlsys rewards "
            "list` shows them), or a model in reward.reward_model",
            ("reward.reward_funcs", "reward.reward_model"),
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        yield Problem(
            f"reward.reward_funcs names {', '.join(repeated)} more than once: name each once, and "
            "give it a larger weight in reward.reward_weights if it should count more",
            ("reward.reward_funcs",),
        )
    if weights is not None and len(weights) != len(names):
        yield Problem(
            f"reward.reward_weights has {counted(len(weights), 'value')} for "
            f"{counted(len(names), 'reward function')} "
            f"({', '.join(names)}): give one weight for each, or leave it out for 1 each",
            ("reward.reward_weights", "reward.reward_funcs"),
        )
    # Settings under reward_model are for all models.
    known = {*names, *(["reward_model"] if reward.models else [])}
    stray = sorted(set(reward.reward_params) - known)
    if stray:
        yield Problem(
            f"reward.reward_params has settings for {', '.join(stray)}, which reward.reward_funcs "
            f"does not name ({', '.join(names)}): add it there, or take its settings out",
            ("reward.reward_params", "reward.reward_funcs"),
        )
    yield from _gate_problems(reward)
    if weights and not any(weights):
        yield Problem(
            "reward.reward_weights are all 0, so there is nothing to learn from: give at least one "
            "reward function another weight",
            ("reward.reward_weights",),
        )


def _gate_problems(reward: RewardConfig) -> Iterator[Problem]:
    names, gates = reward.names, reward.gate
    for gated, text in gates.items():
        try:
            by = parse_gate(text).by
        except ValueError as error:
            yield Problem(f"reward.gate of {gated}: {error}", ("reward.gate",))
            continue
        stray = [name for name in (gated, by) if name not in names]
        if stray:
            yield Problem(
                f"reward.gate lets {gated} count where {text}, but reward.reward_funcs does not "
                f"name {' and '.join(stray)}: add it there, with weight 0 in "
                "reward.reward_weights if it should only be the gate",
                ("reward.gate", "reward.reward_funcs"),
            )
        elif by in gates:
            yield Problem(
                f"reward.gate lets {gated} count where {text}, but {by} has a gate itself: gate "
                f"{gated} by what gates {by} ({gates[by]}), or take one of the two gates out",
                ("reward.gate",),
            )


def _optimizer_problems(config: Config) -> Iterator[Problem]:
    policy, (epsilon, _) = config.policy, config.grpo.epsilons
    if policy.min_lr > policy.lr:
        yield Problem(
            f"policy.min_lr = {policy.min_lr:g} is above policy.lr = {policy.lr:g}, where the "
            "decay starts: lower min_lr or raise lr",
            ("policy.min_lr", "policy.lr"),
        )
    if epsilon >= 1 and config.grpo.loss_type in CLIPPED_LOSSES:
        name = "epsilon" if config.grpo.epsilon_low is None else "epsilon_low"
        yield Problem(
            f"grpo.{name} = {epsilon:g} puts the lower clip bound at {1 - epsilon:g}, which no "
            "ratio of probabilities reaches: use a value below 1, such as 0.2 (grpo.epsilon_high "
            "may be larger)",
            (f"grpo.{name}",),
        )


def _rollout_problems(config: Config) -> Iterator[Problem]:
    rollout, ahead = config.rollout, config.rollout.oversample_prompts
    fields = ("rollout.max_staleness", "rollout.oversample_prompts")
    most = rollout.max_staleness * config.num_prompts
    if rollout.max_staleness and ahead == 0:
        yield Problem(
            f"rollout.max_staleness = {rollout.max_staleness} with oversample_prompts = 0 leaves "
            "nothing to sample while the policy is updated: leave oversample_prompts out, or set "
            "max_staleness to 0",
            fields,
        )
    elif rollout.max_staleness and ahead and ahead > most:
        yield Problem(
            f"rollout.oversample_prompts = {ahead} is more than the {most} "
            f"prompts that {rollout.max_staleness} further batches of {config.num_prompts} can "
            f"hold, so some would get staler than rollout.max_staleness: use at most "
            f"{most}, or a larger max_staleness",
            fields,
        )
    if rollout.max_staleness and config.grpo.old_logprobs == "rollout":
        yield Problem(
            f"grpo.old_logprobs = rollout with rollout.max_staleness = {rollout.max_staleness} "
            "would clip against policies that are up to so many updates old, so that what those "
            "updates changed counts as this one's: use old_logprobs auto, which clips against the "
            "policy before this update and corrects for staleness with grpo.rollout_is",
            ("grpo.old_logprobs", "rollout.max_staleness"),
        )
    if rollout.num_engines % rollout.engines_per_gpu:
        yield Problem(
            f"rollout.num_engines = {rollout.num_engines} is not a multiple of "
            f"rollout.engines_per_gpu = {rollout.engines_per_gpu}, and every GPU has as many: use "
            f"{near_multiples(rollout.num_engines, rollout.engines_per_gpu)} engines",
            ("rollout.num_engines", "rollout.engines_per_gpu"),
        )
    if rollout.engines_per_gpu > 1 and rollout.tensor_parallel_size > 1:
        yield Problem(
            f"rollout.engines_per_gpu = {rollout.engines_per_gpu} is for engines of one GPU, and "
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size}: set one of them to 1",
            ("rollout.engines_per_gpu", "rollout.tensor_parallel_size"),
        )
    if rollout.in_flight_kv == "keep" and not rollout.max_staleness:
        yield Problem(
            "rollout.in_flight_kv = keep has no effect with rollout.max_staleness = 0, where no "
            "completion is unfinished when weights change: leave it out, or set max_staleness to "
            "1 or more",
            ("rollout.in_flight_kv", "rollout.max_staleness"),
        )
    if rollout.dynamic_sample:
        yield from _dynamic_sample_problems(config)
    elif rollout.max_resample_times != type(rollout).model_fields["max_resample_times"].default:
        yield Problem(
            f"rollout.max_resample_times = {rollout.max_resample_times} has no effect without "
            "rollout.dynamic_sample: set that, or leave it out",
            ("rollout.max_resample_times", "rollout.dynamic_sample"),
        )


def _dynamic_sample_problems(config: Config) -> Iterator[Problem]:
    grpo = config.grpo
    if grpo.advantage_estimator == "reinforce_plus_plus":
        yield Problem(
            "rollout.dynamic_sample replaces groups whose rewards are all equal because they teach "
            "nothing, but with grpo.advantage_estimator = reinforce_plus_plus they do: it compares "
            "over the batch and not within groups. Leave dynamic_sample out, or use another "
            "estimator, such as grpo",
            ("rollout.dynamic_sample", "grpo.advantage_estimator"),
        )
    if grpo.multi_objective_aggregation == "normalize_then_sum":
        yield Problem(
            "rollout.dynamic_sample looks at total rewards, but with "
            "grpo.multi_objective_aggregation = normalize_then_sum a group with equal totals still "
            "teaches something where its reward functions differ. Leave dynamic_sample out, or use "
            "sum_then_normalize",
            ("rollout.dynamic_sample", "grpo.multi_objective_aggregation"),
        )


def _data_problems(config: Config) -> Iterator[Problem]:
    data = config.data
    if config.eval_steps is not None and not data.val_dataset and not data.split_dataset_ratio:
        yield Problem(
            f"eval_steps = {config.eval_steps}, but there is nothing to evaluate on: set "
            "data.val_dataset, or data.split_dataset_ratio (0.05 holds out 5 % of data.dataset), "
            "or leave eval_steps out",
            ("eval_steps", "data.val_dataset", "data.split_dataset_ratio"),
        )
    if data.val_dataset and data.split_dataset_ratio:
        yield Problem(
            f"data.val_dataset and data.split_dataset_ratio = {data.split_dataset_ratio:g} both "
            "say what is held out: leave one of them out",
            ("data.val_dataset", "data.split_dataset_ratio"),
        )


def _dataset_problems(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.dataset_weights is not None and len(data.dataset_weights) != len(data.dataset):
        yield Problem(
            f"data.dataset_weights has {counted(len(data.dataset_weights), 'value')} for "
            f"{counted(len(data.dataset), 'dataset')} ({', '.join(data.dataset)}): give one weight "
            "for each, or leave it out to take every row once an epoch",
            ("data.dataset_weights", "data.dataset"),
        )
    if len(data.preprocessor) > 1 and len(data.preprocessor) != len(data.dataset):
        yield Problem(
            f"data.preprocessor has {counted(len(data.preprocessor), 'name')} for "
            f"{counted(len(data.dataset), 'dataset')}: give one for all, or one for each (none "
            "leaves rows as they are)",
            ("data.preprocessor", "data.dataset"),
        )
    if len(data.val_preprocessor) > 1 and len(data.val_preprocessor) != len(data.val_dataset):
        yield Problem(
            f"data.val_preprocessor has {counted(len(data.val_preprocessor), 'name')} for "
            f"{counted(len(data.val_dataset), 'dataset')}: give one for all, or one for each",
            ("data.val_preprocessor", "data.val_dataset"),
        )
    if data.val_dataset and len(data.preprocessor) > 1 and not data.val_preprocessor:
        yield Problem(
            "data.preprocessor has one name for each of data.dataset, which says nothing about "
            "data.val_dataset: set data.val_preprocessor (none leaves rows as they are)",
            ("data.val_preprocessor", "data.preprocessor", "data.val_dataset"),
        )
    if data.min_prompt_length > data.max_prompt_length:
        yield Problem(
            f"data.min_prompt_length = {data.min_prompt_length} is above data.max_prompt_length = "
            f"{data.max_prompt_length}, so no prompt fits: lower one or raise the other",
            ("data.min_prompt_length", "data.max_prompt_length"),
        )
    if data.streaming and data.split_dataset_ratio:
        yield Problem(
            f"data.split_dataset_ratio = {data.split_dataset_ratio:g} needs all rows at once, "
            "which data.streaming does not have: set data.val_dataset, or do not stream",
            ("data.streaming", "data.split_dataset_ratio"),
        )
    if data.streaming and data.deduplicate:
        yield Problem(
            "data.deduplicate needs all rows at once, which data.streaming does not have: remove "
            "duplicates from the files, or do not stream",
            ("data.streaming", "data.deduplicate"),
        )
    taken = sorted(set(data.chat_template_kwargs) & set(OWN_TEMPLATE_ARGUMENTS))
    if taken:
        yield Problem(
            f"data.chat_template_kwargs has {', '.join(taken)}, which rlsys sets itself: leave it "
            "out; it is for variables that the template reads, such as enable_thinking",
            ("data.chat_template_kwargs",),
        )
