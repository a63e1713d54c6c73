"""Rules about `placement`: which runs can let policy and rollout engines share GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def placement_rules(config: Config) -> Iterator[Problem]:
    """Problems of `placement` and of the fields that only it reads."""
    if config.placement == "colocated":
        yield from colocation_obstacles(config)
        return
    if config.weight_sync.transport == "ipc":
        yield Problem(
            "weight_sync.transport = ipc is for a policy and engines on the same GPU, and "
            f"placement is {config.placement}: set placement to colocated, or transport to auto"
        )
    if config.placement == "dedicated":
        default = type(config.colocated)()
        for name in type(default).model_fields:
            if (value := getattr(config.colocated, name)) != getattr(default, name):
                yield Problem(
                    f"colocated.{name} = {value} has no effect with placement = dedicated: leave "
                    "it out, or set placement to colocated"
                )


FIXED_ADDRESSES = (
    "nccl_ub",
    "cuda_graph_impl",
    "enable_cuda_graph",
    "external_cuda_graph",
    "optimizer_cuda_graph",
)
"""Options of megatron-core with which the policy's memory cannot move."""


def colocation_obstacles(config: Config) -> Iterator[Problem]:
    """Why policy and engines of this run cannot share GPUs."""
    rollout, ranks = config.rollout, config.policy.world_size
    if rollout.max_staleness:
        yield Problem(
            f"rollout.max_staleness = {rollout.max_staleness} lets engines sample while the policy "
            "is updated, and with placement = colocated they take turns: set max_staleness to 0, "
            "or placement to dedicated"
        )
    if rollout.tensor_parallel_size > 1:
        yield Problem(
            f"rollout.tensor_parallel_size = {rollout.tensor_parallel_size} spreads an engine over "
            "GPUs, and with placement = colocated each policy rank's GPU has engines of its own: "
            f"set it to 1 and rollout.num_engines to {ranks * rollout.engines_per_gpu}, or "
            "placement to dedicated"
        )
    elif rollout.num_engines > ranks * rollout.engines_per_gpu:
        yield Problem(
            f"rollout.num_engines = {rollout.num_engines} does not fit on the policy's GPUs, "
            f"policy.world_size {ranks} x rollout.engines_per_gpu {rollout.engines_per_gpu}: use "
            f"at most {ranks * rollout.engines_per_gpu} engines, or placement = dedicated"
        )
    if rollout.draft_model is not None:
        yield Problem(
            "rollout.speculative_config: with placement = colocated engines drop all weights while "
            "the policy trains, and only the policy's come back, not those of model "
            f"{rollout.draft_model}: use method ngram, or placement = dedicated"
        )
    if config.weight_sync.transport == "nccl":
        yield Problem(
            "weight_sync.transport = nccl does not allow two ranks on one GPU, which placement = "
            "colocated has: set transport to auto"
        )
    for name in FIXED_ADDRESSES:
        value = config.policy.megatron_kwargs.get(name)
        if value not in (None, False, "none"):
            yield Problem(
                f"policy.megatron_kwargs.{name} = {value} keeps addresses of the policy's memory, "
                "which moves with placement = colocated: leave it out, or set placement to "
                "dedicated"
            )
