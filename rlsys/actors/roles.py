"""Which processes a run consists of, and what each gets: pure arithmetic on the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlsys.config import Config
from rlsys.text import counted
from rlsys.types import Device

RoleName = Literal["policy", "rollout", "reference", "reward_model", "reward"]


@dataclass(frozen=True, slots=True)
class Role:
    """One Ray actor, which is one process (and on GPUs vLLM's workers below it)."""

    name: RoleName
    rank: int
    """Position within its group: policy and reference rank, engine or worker number."""
    gpus: int
    """Whole GPUs of its own; 0 on CPU."""
    cpu_threads: int
    """Threads that it computes with on CPU; on GPUs it merely feeds them."""
    shares_gpu_of: tuple[RoleName, int] | None = None
    """Name and rank of the actor on whose GPU it runs."""


def plan_roles(config: Config, *, device: Device) -> list[Role]:
    """Every actor of the run, group by group: policy, rollout, reference and reward models (if
    any), reward."""
    gpu = 1 if device == "cuda" else 0
    policy, rollout, reference = config.policy, config.rollout, config.reference
    roles = [Role("policy", rank, gpu, policy.cpu_threads) for rank in range(policy.world_size)]
    for rank in range(rollout.num_engines):
        first = rank - rank % rollout.engines_per_gpu if gpu else rank
        roles.append(
            Role(
                "rollout",
                rank,
                gpu * rollout.tensor_parallel_size if rank == first else 0,
                rollout.tensor_parallel_size,
                shares_gpu_of=None if rank == first else ("rollout", first),
            )
        )
    if config.grpo.beta > 0:
        shares = gpu > 0 and reference.placement == "policy"
        roles += [
            Role(
                "reference",
                rank,
                0 if shares else gpu,
                policy.cpu_threads,
                shares_gpu_of=("policy", rank) if shares else None,
            )
            for rank in range(reference.world_size)
        ]
    shares = gpu > 0 and config.reward.reward_model_placement == "policy"
    roles += [
        Role(
            "reward_model",
            i,
            0 if shares else gpu,
            1,
            shares_gpu_of=("policy", i % policy.world_size) if shares else None,
        )
        for i in range(len(config.reward.models))
    ]
    roles += [Role("reward", rank, 0, 1) for rank in range(config.reward.num_workers)]
    return roles


def asked_for(roles: Sequence[Role]) -> str:
    """How many GPUs they need in all, and who of them how many."""
    gpus = {
        name: sum(role.gpus for role in roles if role.name == name)
        for name in dict.fromkeys(role.name for role in roles)
    }
    parts = ", ".join(f"{name} {number}" for name, number in gpus.items() if number)
    return f"the run needs {counted(sum(gpus.values()), 'GPU')} ({parts})"


def fewer_gpus(roles: Sequence[Role], there_are: int) -> str:
    """What to do where there are not enough GPUs: what would help these roles, and nothing else."""
    on_cpu = "run on the CPU with --device cpu"
    if not there_are:
        return f"{on_cpu}, or where there are GPUs"
    if there_are < LEAST_GPUS:
        return (
            f"a run on GPUs needs at least {LEAST_GPUS}, one for the policy and one for a rollout "
            f"engine: {on_cpu}, or use a machine or a Ray cluster (RAY_ADDRESS) with more GPUs"
        )
    gpus = {name: [r.gpus for r in roles if r.name == name and r.gpus] for name in GPU_REMEDIES}
    remedies = [remedy for name, (least, remedy) in GPU_REMEDIES.items() if sum(gpus[name]) > least]
    return f"{', '.join(remedies)}, or add GPUs"


LEAST_GPUS = 2
"""One for the policy, one for a rollout engine."""
GPU_REMEDIES: dict[RoleName, tuple[int, str]] = {
    "policy": (1, "lower policy.world_size"),
    "rollout": (
        1,
        "lower rollout.num_engines or rollout.tensor_parallel_size, raise rollout.engines_per_gpu",
    ),
    "reference": (0, "set reference.placement to policy"),
    "reward_model": (0, "set reward.reward_model_placement to policy"),
}
"""Role -> GPUs that it cannot do without, and how it uses fewer."""
