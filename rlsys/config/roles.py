"""Which processes a run consists of, and what each gets: pure arithmetic on the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rlsys.config import Config, ReferencedConfig, RunConfig
from rlsys.config.rules_colocated import colocation_obstacles
from rlsys.config.schema import AnyConfig
from rlsys.text import counted
from rlsys.types import Device

RoleName = Literal["policy", "rollout", "reference", "teacher", "reward_model", "reward"]


@dataclass(frozen=True, slots=True)
class Role:
    """One Ray actor: one process, and on GPUs vLLM's workers below it."""

    name: RoleName
    rank: int
    """Number of the rank, the engine, the reward model or the worker."""
    gpus: int
    """Whole GPUs of its own; 0 on CPU, and 0 for a role that shares another's GPU."""
    cpu_threads: int
    """Threads that it computes with on CPU; on GPUs they only feed the GPU."""
    shares_gpu_of: tuple[RoleName, int] | None = None
    """Name and rank of the actor on whose GPU it runs."""


def decide_placement(config: AnyConfig, *, device: Device, num_gpus: int) -> AnyConfig:
    """`config` with `placement` decided for a machine or cluster with `num_gpus` GPUs."""
    if not isinstance(config, Config) or config.placement != "auto":
        return config
    dedicated, colocated = (
        config.model_copy(update={"placement": placement})
        for placement in ("dedicated", "colocated")
    )
    if device == "cpu" or any(colocation_obstacles(config)):
        return dedicated
    fits = _num_gpus(dedicated) <= num_gpus or num_gpus < _num_gpus(colocated)
    return dedicated if fits else colocated


def decide_cpu_threads(config: AnyConfig, *, device: Device, cores: int) -> AnyConfig:
    """`config` with `policy.cpu_threads` decided for nodes with `cores` CPU cores.

    Ray puts all ranks of a run on CPU on one node if it can. In GRPO policy, reference and engines
    compute one after the other, unless engines sample ahead: then more threads wait for each other
    than compute.
    """
    if config.policy.cpu_threads != "auto":
        return config
    threads, ranks = 1, config.policy.world_size
    if isinstance(config, ReferencedConfig) and config.has_reference_model:
        ranks = max(ranks, config.reference.world_size)
    if config.used_teacher is not None:
        ranks = max(ranks, config.used_teacher.world_size)
    samples_ahead = isinstance(config, Config) and config.rollout.max_staleness > 0
    if device == "cpu" and not samples_ahead:
        threads = max(1, cores // ranks)
    policy = config.policy.model_copy(update={"cpu_threads": threads})
    return config.model_copy(update={"policy": policy})


def _num_gpus(config: RunConfig) -> int:
    return sum(role.gpus for role in plan_roles(config, device="cuda"))


def plan_roles(config: RunConfig, *, device: Device) -> list[Role]:
    """Every actor of the run: policy, teacher, reference; in GRPO rollout, reward models, workers.

    `placement: auto` counts as dedicated; see `decide_placement`.
    """
    gpu, policy = 1 if device == "cuda" else 0, config.policy
    roles = [Role("policy", rank, gpu, policy.num_cpu_threads) for rank in range(policy.world_size)]
    if config.sampler is not None:
        roles += _engine_roles(config.sampler, gpu)
    if isinstance(config, ReferencedConfig):
        roles += _reference_roles(config, gpu)
    roles += _teacher_roles(config, gpu)
    return roles + _reward_roles(config, gpu) if isinstance(config, Config) else roles


def _engine_roles(config: Config, gpu: int) -> list[Role]:
    rollout = config.rollout
    roles: list[Role] = []
    for rank in range(rollout.num_engines):
        threads = rollout.tensor_parallel_size
        first = rank - rank % rollout.engines_per_gpu if gpu else rank
        if gpu and config.is_colocated:
            owner: tuple[RoleName, int] = ("policy", rank // rollout.engines_per_gpu)
            roles.append(Role("rollout", rank, 0, threads, shares_gpu_of=owner))
        elif rank == first:
            roles.append(Role("rollout", rank, gpu * threads, threads))
        else:
            roles.append(Role("rollout", rank, 0, threads, shares_gpu_of=("rollout", first)))
    return roles


def _reference_roles(config: ReferencedConfig, gpu: int) -> list[Role]:
    if not config.has_reference_model:
        return []
    reference = config.reference
    beside = partial(_beside_policy, config, gpu, shares=reference.placement == "policy")
    threads = config.policy.num_cpu_threads
    return [beside("reference", rank, threads) for rank in range(reference.world_size)]


def _teacher_roles(config: RunConfig, gpu: int) -> list[Role]:
    teacher = config.used_teacher
    if teacher is None:
        return []
    beside = partial(_beside_policy, config, gpu, shares=teacher.placement == "policy")
    threads = config.policy.num_cpu_threads
    return [beside("teacher", rank, threads) for rank in range(teacher.world_size)]


def _reward_roles(config: Config, gpu: int) -> list[Role]:
    reward = config.reward
    shares = reward.reward_model_placement == "policy"
    beside = partial(_beside_policy, config, gpu, shares=shares)
    roles = [beside("reward_model", i, 1) for i in range(len(reward.models))]
    return roles + [Role("reward", rank, 0, 1) for rank in range(reward.num_workers)]


def _beside_policy(
    config: RunConfig, gpu: int, name: RoleName, rank: int, threads: int, *, shares: bool
) -> Role:
    """An actor with a GPU of its own, or one that shares the GPU of a policy rank."""
    if gpu and shares:
        return Role(name, rank, 0, threads, ("policy", rank % config.policy.world_size))
    return Role(name, rank, gpu, threads)


def groups_on_one_node(config: RunConfig, owners: Sequence[Role]) -> list[list[Role]]:
    """Actors with GPUs of their own, in groups whose GPUs have to be on one node.

    Tensor-parallel ranks exchange activations in every layer, which takes NVLink. megatron-core
    numbers them first. An engine is a group by itself; its workers are below it.
    """
    sizes: dict[RoleName, int] = {"policy": config.policy.tensor_parallel_size}
    if isinstance(config, ReferencedConfig):
        sizes["reference"] = config.reference.tensor_parallel_size
    if config.used_teacher is not None:
        sizes["teacher"] = config.used_teacher.tensor_parallel_size
    groups: dict[tuple[RoleName, int], list[Role]] = {}
    for role in owners:
        groups.setdefault((role.name, role.rank // sizes.get(role.name, 1)), []).append(role)
    return list(groups.values())


def describe_gpu_demand(roles: Sequence[Role]) -> str:
    """How many GPUs the roles need in all, and how many each role needs."""
    gpus = {
        name: sum(role.gpus for role in roles if role.name == name)
        for name in dict.fromkeys(role.name for role in roles)
    }
    parts = ", ".join(f"{name} {number}" for name, number in gpus.items() if number)
    return f"the run needs {counted(sum(gpus.values()), 'GPU')} ({parts})"


def fewer_gpus(config: RunConfig, roles: Sequence[Role], available: int) -> str:
    """What to do about too few GPUs; names only the settings that would help these roles."""
    on_cpu = "run on the CPU with --device cpu"
    if not available:
        return f"{on_cpu}, or where there are GPUs"
    gpus = {name: sum(r.gpus for r in roles if r.name == name) for name in GPU_REMEDIES}
    remedies = [remedy for name, (least, remedy) in GPU_REMEDIES.items() if gpus[name] > least]
    if gpus["policy"] and gpus["rollout"]:
        remedies.append(
            "set placement to colocated (with rollout.max_staleness 0, "
            "rollout.tensor_parallel_size 1, and no more engines than fit on the policy's GPUs)"
            if isinstance(config, Config)
            else "set distill.lmbda to 0, where the student samples nothing"
        )
    return f"{', '.join(remedies)}, or add GPUs" if remedies else "add GPUs"


GPU_REMEDIES: dict[RoleName, tuple[int, str]] = {
    "policy": (1, "lower policy.world_size"),
    "rollout": (
        1,
        "lower rollout.num_engines or rollout.tensor_parallel_size, raise rollout.engines_per_gpu",
    ),
    "reference": (0, "set reference.placement to policy"),
    "teacher": (0, "set teacher.placement to policy"),
    "reward_model": (0, "set reward.reward_model_placement to policy"),
}
"""Role -> the fewest GPUs it can do with, and how to make it use fewer."""
