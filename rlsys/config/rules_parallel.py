"""Rules about ranks: how the policy and the reference are cut over them, and what they overlap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem
from rlsys.text import near_multiples

if TYPE_CHECKING:
    from rlsys.config.schema import Config, PolicyConfig


def parallelism_problems(config: Config) -> Iterator[Problem]:
    """Every rule about ranks that `config` breaks."""
    yield from _layout_problems(config)
    yield from _expert_parallelism_problems(config.policy)
    yield from _attention_problems(config)
    yield from _reference_problems(config)
    yield from _overlap_problems(config)
    yield from _recompute_problems(config)


def _layout_problems(config: Config) -> Iterator[Problem]:
    policy = config.policy
    tp, pp, cp = (
        policy.tensor_parallel_size,
        policy.pipeline_parallel_size,
        policy.context_parallel_size,
    )
    rank_fields = (
        "policy.world_size",
        "policy.tensor_parallel_size",
        "policy.pipeline_parallel_size",
        "policy.context_parallel_size",
    )
    if policy.world_size % (tp * pp * cp):
        yield Problem(
            f"policy.world_size = {policy.world_size} is not a multiple of tensor_parallel_size "
            f"{tp} x pipeline_parallel_size {pp} x context_parallel_size {cp} = {tp * pp * cp}: "
            f"use {near_multiples(policy.world_size, tp * pp * cp)} ranks",
            rank_fields,
        )
    elif config.global_batch_size % config.data_parallel_size:
        field = name = "policy.global_batch_size"
        if policy.global_batch_size is None:
            field = "rollout.generation_batch_size"
            name = f"{field} (which policy.global_batch_size defaults to)"
        yield Problem(
            f"{name} = {config.global_batch_size} cannot be shared equally among "
            f"{config.data_parallel_size} data-parallel ranks (policy.world_size "
            f"{policy.world_size} / ({tp} x {pp} x {cp})): use "
            f"{near_multiples(config.global_batch_size, config.data_parallel_size)}, or another "
            "number of ranks",
            (*rank_fields, field),
        )


def _attention_problems(config: Config) -> Iterator[Problem]:
    cp = config.largest_context_parallel_size
    if cp > 1 and config.policy.attention_backend == "unfused":
        yield Problem(
            f"policy.attention_backend = unfused knows no context_parallel_size = {cp}, of the "
            "policy or the reference: use auto, fused or flash",
            (
                "policy.attention_backend",
                "policy.context_parallel_size",
                "reference.context_parallel_size",
            ),
        )


def _reference_problems(config: Config) -> Iterator[Problem]:
    policy, reference = config.policy, config.reference
    replica = reference.tensor_parallel_size * reference.context_parallel_size
    if reference.world_size % replica:
        yield Problem(
            f"reference.world_size = {reference.world_size} is not a multiple of "
            f"reference.tensor_parallel_size {reference.tensor_parallel_size} x "
            f"context_parallel_size {reference.context_parallel_size} = {replica}: use "
            f"{near_multiples(reference.world_size, replica)} ranks",
            (
                "reference.world_size",
                "reference.tensor_parallel_size",
                "reference.context_parallel_size",
            ),
        )
    if reference.sync_steps is not None and config.grpo.beta == 0:
        yield Problem(
            f"reference.sync_steps = {reference.sync_steps}, but with grpo.beta = 0 there is no "
            "reference: set grpo.beta, or leave sync_steps out",
            ("reference.sync_steps", "grpo.beta"),
        )
    if (
        config.grpo.beta > 0
        and reference.placement == "policy"
        and reference.world_size > policy.world_size
    ):
        yield Problem(
            f"reference.world_size = {reference.world_size} is more than the "
            f"{policy.world_size} ranks of the policy, whose GPUs it shares "
            "(reference.placement = policy): lower it, or set reference.placement to own",
            ("reference.world_size", "reference.placement", "policy.world_size"),
        )


def _overlap_problems(config: Config) -> Iterator[Problem]:
    policy = config.policy
    if not policy.overlap_param_gather:
        return
    if not policy.use_distributed_optimizer:
        yield Problem(
            "policy.overlap_param_gather gathers weights that policy.use_distributed_optimizer "
            "cuts, and that is false: set it to true, or leave overlap_param_gather out",
            ("policy.overlap_param_gather", "policy.use_distributed_optimizer"),
        )
    if not policy.overlap_grad_reduce:
        yield Problem(
            "policy.overlap_param_gather works on the parts that policy.overlap_grad_reduce cuts "
            "gradients into: set that to true as well, or leave overlap_param_gather out",
            ("policy.overlap_param_gather", "policy.overlap_grad_reduce"),
        )


def _recompute_problems(config: Config) -> Iterator[Problem]:
    policy = config.policy
    # A run's saved config says the default too.
    default = type(policy).model_fields["recompute_modules"].default
    if policy.recompute_modules != default and policy.recompute != "selective":
        yield Problem(
            f"policy.recompute_modules says what policy.recompute = selective computes again, and "
            f"that is {policy.recompute}: set it to selective, or leave recompute_modules out",
            ("policy.recompute_modules", "policy.recompute"),
        )


def _expert_parallelism_problems(policy: PolicyConfig) -> Iterator[Problem]:
    ep, pp = policy.expert_model_parallel_size, policy.pipeline_parallel_size
    stage = policy.world_size // pp
    if policy.world_size % pp == 0 and stage % ep:
        yield Problem(
            f"policy.expert_model_parallel_size = {ep} does not divide the {stage} ranks that hold "
            f"a layer (policy.world_size {policy.world_size} / pipeline_parallel_size {pp}): use a "
            "number that does",
            (
                "policy.expert_model_parallel_size",
                "policy.world_size",
                "policy.pipeline_parallel_size",
            ),
        )
