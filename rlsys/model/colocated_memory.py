"""Memory of a GPU that policy and rollout engines share, phase by phase: an estimate.

Sums of `rlsys.model.memory`'s parts, by who has them in which phase. What waits on the host is
counted as it is pinned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsys.config import Config
from rlsys.model.adapters import syncs_adapter
from rlsys.model.host_memory import LARGE_WEIGHTS, slab_sizes
from rlsys.model.memory import MemoryEstimate
from rlsys.model.policy_memory import GIB
from rlsys.model.shape import ModelShape

_AT_WORK = ("activations", "logits")
"""Parts that exist only while a model computes."""


@dataclass(frozen=True)
class Phase:
    """What a GPU holds in one phase of a step, at the most."""

    name: str
    gib: dict[str, float]
    """GiB by who holds what."""
    remedy: str
    """What to change if that is too much."""

    @property
    def total_gib(self) -> float:
        """Sum over holders."""
        return sum(self.gib.values())


def weights_leave(config: Config, policy: MemoryEstimate, gpu_gib: float | None) -> bool:
    """colocated.offload_weights, decided; auto stays where the GPU is not known."""
    leaves = config.colocated.offload_weights
    if leaves == "auto":
        return gpu_gib is not None and policy.gib["weights"] > LARGE_WEIGHTS * gpu_gib
    return leaves


def colocated_phases(
    config: Config, estimates: Sequence[MemoryEstimate], gpu_gib: float | None
) -> list[Phase]:
    """The phases of a colocated step, in their order.

    Args:
        estimates: of all roles that hold a model.
        gpu_gib: memory of a GPU; None if it is not known.
    """
    by_role = {estimate.role: estimate for estimate in estimates}
    policy, engine = by_role["policy"].gib, by_role["rollout"].gib
    engines = config.rollout.engines_per_gpu
    asleep = engines * _idle(engine)
    others = _others(config, by_role)
    state = policy["optimizer"]
    leaves = weights_leave(config, by_role["policy"], gpu_gib)
    left = _idle(policy)
    left += 0.0 if leaves else policy["weights"]
    left += 0.0 if config.colocated.offload_optimizer else state
    kept = sum(gib for purpose, gib in policy.items() if purpose not in _AT_WORK)
    phases = [
        Phase(
            "rollout",
            {"engines": _awake(config, engine, gpu_gib), "policy (what stays)": left} | others,
            _rollout_remedy(config, leaves),
        ),
        Phase(
            "update",
            {
                "policy (kept)": kept,
                "policy (activations and logits)": sum(policy.values()) - kept,
                "engines (asleep)": asleep,
            }
            | others,
            _update_remedy(config, kept + asleep + sum(others.values()), gpu_gib),
        ),
        Phase(
            "weight sync",
            {
                "engines (weights and buckets)": asleep + engines * _weights(engine),
                "policy (weights and buckets)": _idle(policy) + policy["weights"],
                "policy (optimizer on its way)": state,
            }
            | others,
            _fewer_numbers(config),
        ),
    ]
    for role, coefficient in (("teacher", "opd_kl_coef"), ("reference", "beta")):
        if _waits(config, by_role, role):
            computes = by_role[role].total_gib - _idle(by_role[role].gib)
            held = {role: computes, "policy": kept, "engines (asleep)": asleep}
            remedy = (
                f"set {role}.placement to own, where there is another GPU, or grpo.{coefficient} "
                "to 0"
            )
            phases.insert(1, Phase(role, held | others, remedy))
    return phases


def _waits(config: Config, by_role: Mapping[str, MemoryEstimate], role: str) -> bool:
    """Whether a frozen model waits in host memory between its turns on the policy's GPUs."""
    section = config.teacher if role == "teacher" else config.reference
    return role in by_role and section.placement == "policy"


def pinned_gib(
    config: Config,
    shape: ModelShape,
    estimates: Sequence[MemoryEstimate],
    gpu_gib: float | None,
) -> dict[str, float]:
    """GiB of pinned host memory of one policy rank and the engines on its GPU, by what waits."""
    by_role = {estimate.role: estimate for estimate in estimates}
    policy = by_role["policy"]
    waiting = {}
    if config.colocated.offload_optimizer:
        waiting["the optimizer's state"] = _pinned(policy.gib["optimizer"])
    if weights_leave(config, policy, gpu_gib):
        waiting["the policy's weights"] = _pinned(policy.gib["weights"])
    if syncs_adapter(config, shape, "cuda"):
        # The base is sent once, so that a sleeping engine keeps it.
        engines = config.rollout.engines_per_gpu
        waiting["the engines' base weights"] = engines * by_role["rollout"].gib["weights"]
    for role in ("reference", "teacher"):
        if _waits(config, by_role, role):
            waiting[f"the {role}'s weights"] = by_role[role].gib["weights"]
    return waiting


def _idle(gib: Mapping[str, float]) -> float:
    """What a process has on its GPU that holds a model no more."""
    return gib["process"] + gib.get("weight sync", 0.0)


def _weights(engine: Mapping[str, float]) -> float:
    return engine["weights"] + engine.get("adapter", 0.0)


def _others(config: Config, by_role: Mapping[str, MemoryEstimate]) -> dict[str, float]:
    """Processes on the policy's GPU that take no turns, or hold something between them."""
    found = {}
    reward_model = by_role.get("reward_model")
    for role in ("reference", "teacher"):
        if _waits(config, by_role, role):
            found[f"{role} (its process)"] = _idle(by_role[role].gib)
    if reward_model is not None and config.reward.reward_model_placement == "policy":
        number = math.ceil(len(config.reward.models) / config.policy.world_size)
        found["reward models"] = number * reward_model.total_gib
    return found


def _awake(config: Config, engine: Mapping[str, float], gpu_gib: float | None) -> float:
    """Memory of a GPU's engines while they sample; vLLM takes all that it may for its KV cache."""
    rollout = config.rollout
    if gpu_gib is not None and rollout.kv_cache_memory_mb is None and rollout.engines_per_gpu == 1:
        return rollout.gpu_memory_utilization * gpu_gib
    return rollout.engines_per_gpu * sum(engine.values())


def _rollout_remedy(config: Config, leaves: bool) -> str:
    ways = [] if leaves else ["set colocated.offload_weights to true"]
    ways += (
        [] if config.colocated.offload_optimizer else ["set colocated.offload_optimizer to true"]
    )
    size = "gpu_memory_utilization"
    if config.rollout.kv_cache_memory_mb is not None:
        size = "kv_cache_memory_mb"
    return " or ".join([*ways, f"lower rollout.{size}"])


def _update_remedy(config: Config, always: float, gpu_gib: float | None) -> str:
    """What to change if `always` GiB and activations do not fit."""
    if gpu_gib is not None and always > gpu_gib:
        return _fewer_numbers(config)
    ways = [] if config.policy.recompute == "full" else ["set policy.recompute to full"]
    ways.append("lower policy.max_tokens_per_micro_batch (or policy.micro_batch_size)")
    return " or ".join(ways)


def _fewer_numbers(config: Config) -> str:
    """Ways to a policy that is smaller on each GPU."""
    ways = [] if config.policy.lora is not None else ["set policy.lora"]
    ways.append("raise policy.world_size with policy.tensor_parallel_size")
    return ", or ".join(ways)


def _pinned(gib: float) -> float:
    return sum(slab_sizes(math.ceil(gib * GIB))) / GIB
