"""Numbers that do not fit each other: every rule is found, and its remedy works."""

import re

import pytest
from config_cases import values
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlsys.config import Config
from rlsys.config.fields import config_fields
from rlsys.problems import ProblemsError
from rlsys.text import near_divisors


def problems(**sections) -> list[str]:
    try:
        Config.model_validate(values(**sections))
    except ValidationError as error:
        (detail,) = error.errors()
        rules = detail["ctx"]["error"]
        assert isinstance(rules, ProblemsError)
        return [problem.text for problem in rules.problems]
    return []


def suggested(text: str) -> list[int]:
    return [int(n) for n in re.search(r"use (\d+(?: or \d+)?)", text).group(1).split(" or ")]


@given(
    completions=st.integers(1, 200),
    generations=st.integers(2, 16),
    global_batch=st.none() | st.integers(1, 200),
    ranks=st.integers(1, 12),
    tp=st.integers(1, 4),
    pp=st.integers(1, 4),
    cp=st.integers(1, 3),
)
def test_a_config_is_accepted_exactly_when_its_batches_divide(
    completions, generations, global_batch, ranks, tp, pp, cp
):
    step = global_batch or completions
    layout_fits = ranks % (tp * pp * cp) == 0
    fits = (
        completions % generations == 0
        and completions % step == 0
        and layout_fits
        and step % (ranks // (tp * pp * cp)) == 0
    )
    found = problems(
        rollout={"generation_batch_size": completions, "num_generations": generations},
        policy={
            "global_batch_size": global_batch,
            "world_size": ranks,
            "tensor_parallel_size": tp,
            "pipeline_parallel_size": pp,
            "context_parallel_size": cp,
        },
    )
    assert (found == []) == fits


@given(st.integers(1, 500), st.integers(2, 64))
def test_the_suggested_generation_batch_sizes_are_whole_numbers_of_groups(completions, generations):
    found = problems(rollout={"generation_batch_size": completions, "num_generations": generations})
    for text in found:
        assert str(completions) in text
        assert str(generations) in text
        for number in suggested(text):
            assert number % generations == 0


def test_a_number_of_fifteen_digits_gets_an_answer_at_once():
    assert near_divisors(7, 10**15) == "5 or 8"
    assert near_divisors(10**14 + 1, 10**15) == f"{10**14} or {125 * 10**12}"


@given(st.integers(4, 500).filter(lambda n: n % 4 == 0), st.integers(1, 600))
def test_the_suggested_global_batch_sizes_divide_the_rollout(completions, step):
    rollout = {"generation_batch_size": completions}
    for text in problems(rollout=rollout, policy={"global_batch_size": step}):
        for number in suggested(text):
            assert problems(rollout=rollout, policy={"global_batch_size": number}) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"reference": {"world_size": 3, "tensor_parallel_size": 2}}, ["3", "2", "2 or 4"]),
        (
            {
                "policy": {
                    "world_size": 4,
                    "pipeline_parallel_size": 2,
                    "expert_model_parallel_size": 4,
                }
            },
            ["expert_model_parallel_size = 4", "2 ranks that hold a layer", "4 / ", "2)"],
        ),
        ({"reference": {"sync_steps": 5}}, ["sync_steps = 5", "grpo.beta = 0"]),
        (
            {"reference": {"world_size": 2}, "grpo": {"beta": 0.1}},
            ["reference.world_size = 2", "policy.world_size = 1", "reference.placement to own"],
        ),
        (
            {"reference": {"world_size": 32, "placement": "own"}, "grpo": {"beta": 0.1}},
            ["makes 32 replicas", "16 rows for them (rollout.generation_batch_size)", "most 16"],
        ),
        (
            {"reference": {"mixup_alpha": 0.5}},
            ["mixup_alpha = 0.5", "sync_steps, and that is null"],
        ),
        ({"reward": {"reward_weights": [1.0]}}, ["1 value for 2", "2 reward functions"]),
        ({"reward": {"reward_weights": [0.0, 0.0]}}, ["all 0"]),
        ({"reward": {"reward_funcs": []}}, ["nothing scores", "reward.reward_model"]),
        (
            {"reward": {"reward_model": ["A"], "reward_weights": [1.0, 1.0]}},
            ["2 values", "3 reward functions", "reward_model:A"],
        ),
        ({"reward": {"reward_params": {"reward_model": {"batch_size": 1}}}}, ["does not name"]),
        ({"reward": {"reward_funcs": ["format", "format"]}}, ["format", "more than once"]),
        ({"eval_steps": 5}, ["eval_steps = 5", "val_dataset", "split_dataset_ratio"]),
        ({"eval": {"num_generations": 2, "temperature": 0}}, ["eval.temperature = 0 is greedy"]),
        ({"eval": {"num_generations": 2, "pass_at_k": [1, 4]}}, ["eval.pass_at_k has 4"]),
        ({"eval": {"correct": "acuracy"}}, ["eval.correct", "which is not one of"]),
        ({"eval": {"correct": "format >= x"}}, ["eval.correct = 'format >= x': write"]),
        ({"data": {"val_sets": {"rewards": "a"}}}, ["'rewards' is not a name of a set"]),
        ({"data": {"val_sets": {"a": []}}}, ["a has no files"]),
        ({"data": {"val_dataset": ["v.jsonl"], "split_dataset_ratio": 0.1}}, ["both", "leave one"]),
        ({"rollout": {"num_engines": 5}}, ["5", "4 prompts", "at most 4"]),
        (
            {"rollout": {"num_engines": 3, "engines_per_gpu": 2}},
            ["num_engines = 3", "engines_per_gpu = 2", "2 or 4 engines"],
        ),
        (
            {"rollout": {"num_engines": 2, "engines_per_gpu": 2, "tensor_parallel_size": 2}},
            ["engines_per_gpu = 2", "tensor_parallel_size = 2", "one of them to 1"],
        ),
        (
            {"rollout": {"num_engines": 9, "max_staleness": 1}},
            ["9", "8 prompts", "4 ahead", "at most 8"],
        ),
        (
            {"rollout": {"max_staleness": 1, "oversample_prompts": 0}},
            ["nothing to sample while the policy is updated", "leave oversample_prompts out"],
        ),
        (
            {"rollout": {"max_staleness": 2, "oversample_prompts": 9}},
            ["9", "2 further batches of 4", "at most 8"],
        ),
        (
            {"rollout": {"max_staleness": 2}, "grpo": {"old_logprobs": "rollout"}},
            ["max_staleness = 2", "old_logprobs auto", "rollout_is"],
        ),
        ({"rollout": {"in_flight_kv": "keep"}}, ["no effect", "max_staleness to 1"]),
        (
            {
                "rollout": {"max_staleness": 2},
                "grpo": {"loss_type": "reinforce", "rollout_is": "none"},
            },
            ["has no ratio", "max_staleness = 2", "rollout_is at auto"],
        ),
        ({"rollout": {"max_resample_times": 5}}, ["5", "no effect", "dynamic_sample"]),
        (
            {
                "rollout": {"dynamic_sample": True},
                "grpo": {"advantage_estimator": "reinforce_plus_plus"},
            },
            ["teach nothing", "over the batch", "another estimator"],
        ),
        (
            {
                "rollout": {"dynamic_sample": True},
                "grpo": {"multi_objective_aggregation": "normalize_then_sum"},
            },
            ["equal totals", "sum_then_normalize"],
        ),
        ({"grpo": {"epsilon": 1.5}}, ["1.5", "-0.5", "below 1"]),
        ({"policy": {"lr": 1e-6, "min_lr": 1e-5}}, ["1e-05", "1e-06"]),
        ({"policy": {"max_tokens_per_micro_batch": 100}}, ["100", "128 or more"]),
        ({"checkpoint": {"save_hf_total_limit": 2}}, ["save_hf_steps, which is null"]),
        (
            {"policy": {"overlap_param_gather": True}},
            ["overlap_grad_reduce", "set that to true as well"],
        ),
        (
            {
                "policy": {
                    "overlap_grad_reduce": True,
                    "overlap_param_gather": True,
                    "use_distributed_optimizer": False,
                }
            },
            ["use_distributed_optimizer shards", "that is false"],
        ),
        (
            {
                "policy": {
                    "world_size": 2,
                    "context_parallel_size": 2,
                    "attention_backend": "unfused",
                }
            },
            ["unfused", "context_parallel_size = 2", "use auto"],
        ),
        (
            {"reference": {"world_size": 3, "context_parallel_size": 2}},
            ["3", "context_parallel_size 2", "use 2 or 4"],
        ),
        (
            {"policy": {"recompute": "full", "recompute_modules": ["core_attn"]}},
            ["that is full", "set it to selective"],
        ),
        (
            {"data": {"dataset_weights": [1, 2]}},
            ["2 values for 1 dataset (", "one weight"],
        ),
        (
            {"data": {"preprocessor": ["a", "b"]}},
            ["2 names for 1 dataset in data.dataset:", "one for all"],
        ),
        (
            {"data": {"val_dataset": ["v"], "val_preprocessor": ["a", "b"]}},
            ["2 names for 1 dataset in data.val_dataset:", "val_preprocessor"],
        ),
        (
            {"data": {"dataset": ["a", "b"], "preprocessor": ["a", "b"], "val_dataset": ["v"]}},
            ["says nothing about data.val_dataset", "val_preprocessor"],
        ),
        ({"data": {"min_prompt_length": 65}}, ["min_prompt_length = 65", "max_prompt_length = 64"]),
        ({"data": {"streaming": True, "split_dataset_ratio": 0.1}}, ["0.1", "val_dataset"]),
        ({"data": {"streaming": True, "deduplicate": True}}, ["deduplicate", "do not stream"]),
        ({"data": {"chat_template_kwargs": {"tokenize": False}}}, ["has tokenize", "leave it out"]),
        ({"policy": {"world_size": 3}}, ["generation_batch_size", "16", "3 data-parallel", "15"]),
    ],
)
def test_every_other_rule_names_its_numbers_and_a_remedy(sections, words):
    (text,) = problems(**sections)
    for word in words:
        assert word in text
    assert any(re.search(rf"\b{name}\b", text) for name in config_fields())  # else nothing hides it


@pytest.mark.parametrize(
    "rollout",
    [
        {"max_staleness": 1},
        {"max_staleness": 2, "oversample_prompts": 8, "in_flight_kv": "keep"},
        {"oversample_prompts": 9},
        {"dynamic_sample": True, "max_resample_times": 1},
    ],
)
def test_what_runs_ahead_or_filters_is_accepted_within_the_rules(rollout):
    assert problems(rollout=rollout) == []


def test_staleness_is_corrected_for_unless_that_is_switched_off():
    def correction(rollout, **grpo):
        return Config.model_validate(values(rollout=rollout, grpo=grpo)).algorithm.rollout_is

    assert correction({}) == "none"
    assert correction({"max_staleness": 1}) == "token"
    assert correction({"max_staleness": 1}, rollout_is="sequence") == "sequence"
    assert correction({"max_staleness": 1}, rollout_is="none") == "none"


@pytest.mark.parametrize(
    ("policy", "on_cpu", "grad_reduce", "param_gather"),
    [
        ({}, False, False, False),
        ({"world_size": 2}, False, True, False),
        ({"world_size": 2}, True, False, False),
        ({"world_size": 2, "global_batch_size": 8}, False, True, True),
        ({"world_size": 2, "tensor_parallel_size": 2}, False, False, False),
        (
            {"world_size": 2, "global_batch_size": 8, "use_distributed_optimizer": False},
            False,
            True,
            False,
        ),
        (
            {"world_size": 2, "global_batch_size": 8, "overlap_grad_reduce": False},
            False,
            False,
            False,
        ),
        ({"overlap_grad_reduce": True}, True, True, False),
    ],
)
def test_communication_overlaps_where_there_is_some(policy, on_cpu, grad_reduce, param_gather):
    config = Config.model_validate(values(policy=policy))
    assert config.overlaps_grad_reduce(on_cpu=on_cpu) == grad_reduce
    assert config.overlaps_param_gather(on_cpu=on_cpu) == param_gather


def test_all_broken_rules_are_reported_at_once():
    found = problems(
        rollout={"generation_batch_size": 15},
        reward={"reward_weights": [1.0]},
        policy={"lr": 1e-6, "min_lr": 1.0},
    )
    assert len(found) == 3
