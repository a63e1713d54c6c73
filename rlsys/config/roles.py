"""Which processes a run consists of, and what each gets: pure arithmetic on the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlsys.config import Config, RunConfig
from rlsys.config.rules_colocated import colocation_obstacles
from rlsys.config.schema import AnyConfig
from rlsys.text import counted
from rlsys.types import Device

RoleName = Literal["policy", "rollout", "reference", "reward_model", "reward"]


@dataclass(frozen=True, slots=True)
class Role:
    """One Ray actor: one process, and on GPUs vLLM's workers below it."""

    name: RoleName
    rank: int
    """Number of the policy or reference rank, the engine, the reward model or the worker."""
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
    if isinstance(config, Config) and config.has_reference_model:
        ranks = max(ranks, config.reference.world_size)
    samples_ahead = isinstance(config, Config) and config.rollout.max_staleness > 0
    if device == "cpu" and not samples_ahead:
        threads = max(1, cores // ranks)
    policy = config.policy.model_copy(update={"cpu_threads": threads})
    return config.model_copy(update={"policy": policy})


def _num_gpus(config: RunConfig) -> int:
    return sum(role.gpus for role in plan_roles(config, device="cuda"))


def plan_roles(config: RunConfig, *, device: Device) -> list[Role]:
    """Every actor of the run: policy; in GRPO rollout, reference, reward models and workers.

    `placement: auto` counts as dedicated; see `decide_placement`.
    """
    gpu, policy = 1 if device == "cuda" else 0, config.policy
    roles = [Role("policy", rank, gpu, policy.num_cpu_threads) for rank in range(policy.world_size)]
    return roles + _roles_beside_policy(config, gpu) if isinstance(config, Config) else roles


def _roles_beside_policy(config: Config, gpu: int) -> list[Role]:
    policy, rollout, reference, reward = (
        config.policy,
        config.rollout,
        config.reference,
        config.reward,
    )
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

    def beside_policy(name: RoleName, rank: int, threads: int, *, shares: bool) -> Role:
        """An actor with a GPU of its own, or one that shares the GPU of a policy rank."""
        if gpu and shares:
            return Role(name, rank, 0, threads, ("policy", rank % policy.world_size))
        return Role(name, rank, gpu, threads)

    if config.has_reference_model:
        roles += [
            beside_policy(
                "reference", rank, policy.num_cpu_threads, shares=reference.placement == "policy"
            )
            for rank in range(reference.world_size)
        ]
    roles += [
        beside_policy("reward_model", i, 1, shares=reward.reward_model_placement == "policy")
        for i in range(len(reward.models))
    ]
    return roles + [Role("reward", rank, 0, 1) for rank in range(reward.num_workers)]


def groups_on_one_node(config: RunConfig, owners: Sequence[Role]) -> list[list[Role]]:
    """Actors with GPUs of their own, in groups whose GPUs have to be on one node.

    Tensor-parallel ranks exchange activations in every layer, which takes NVLink. megatron-core
    numbers them first. An engine is a group by itself; its workers are below it.
    """
    sizes: dict[RoleName, int] = {"policy": config.policy.tensor_parallel_size}
    if isinstance(config, Config):
        sizes["reference"] = config.reference.tensor_parallel_size
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


def fewer_gpus(roles: Sequence[Role], available: int) -> str:
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
        )
    return f"{', '.join(remedies)}, or add GPUs" if remedies else "add GPUs"


GPU_REMEDIES: dict[RoleName, tuple[int, str]] = {
    "policy": (1, "lower policy.world_size"),
    "rollout": (
        1,
        "lower rollout.num_engines or rollout.tensor_parallel_size, raise rollout.engines_per_gpu",
    ),
    "reference": (0, "set reference.placement to policy"),
    "reward_model": (0, "set reward.reward_model_placement to policy"),
}
"""Role -> the fewest GPUs it can do with, and how to make it use fewer."""
