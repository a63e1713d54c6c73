"""Which GPU each Ray actor gets: one placement group, a bundle for each that does not share one.

On CPU every actor has a bundle: a share of a core, for which a full cluster may have no room.

The reference is given GPUs of its own, or shares those of the policy (reference.placement): the two
never compute at the same time, so sharing costs nothing but the copy of its weights, which wait in
host memory meanwhile. Reward models score while completions are sampled, when the policy waits too:
they share its GPUs, where their weights stay, or have their own (reward.reward_model_placement).
Rollout engines share a GPU where rollout.engines_per_gpu says so.
Actors in one bundle of one GPU see the same GPU.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.actors.group import CPU_SHARE
from rlsys.config import Config
from rlsys.config.roles import Role, RoleName, describe_gpu_demand, fewer_gpus, plan_roles
from rlsys.types import Device

FIRST_LOOK_S, REPORT_EVERY_S = 5.0, 30.0
"""How long Ray may take to find room before a line says what it waits for."""


class Placement:
    """Ray options of every actor that holds a model.

    Raises:
        ValueError: more GPUs are asked for than the cluster has, has free, or has on one host for
            one engine, or more CPUs than it has free; it says who asks for what.
    """

    def __init__(self, config: Config, *, device: Device):
        roles = [role for role in plan_roles(config, device=device) if role.name != "reward"]
        self._roles = {(role.name, role.rank): role for role in roles}
        self._sharers = Counter(map(self._owner, roles))
        owners = [role for role in roles if role.shares_gpu_of is None]
        if device == "cuda":
            _check_enough(owners)
        self._bundles = {(role.name, role.rank): i for i, role in enumerate(owners)}
        self._group = placement_group(list(map(self._bundle, owners)), strategy="PACK")
        timeout = config.placement_timeout
        _wait_until_placed(self._group, owners, None if timeout == "wait" else timeout)

    def options(self, name: RoleName, rank: int) -> dict[str, Any]:
        """Ray options of one actor."""
        role = self._roles[name, rank]
        return {
            "num_cpus": CPU_SHARE,
            "num_gpus": self._gpus(role),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundles[self._owner(role)]
            ),
        }

    def _owner(self, role: Role) -> tuple[RoleName, int]:
        """The actor whose bundle it is in: itself, or the one whose GPU it shares."""
        return role.shares_gpu_of or (role.name, role.rank)

    def _gpus(self, role: Role) -> float:
        """Of its bundle; equal parts where several share: Ray's bookkeeping, and no limit."""
        sharers = self._sharers[self._owner(role)]
        return 1 / sharers if sharers > 1 else role.gpus

    def _bundle(self, owner: Role) -> dict[str, float]:
        """What it reserves, for those that share its GPU too."""
        cpus = CPU_SHARE * self._sharers[owner.name, owner.rank]
        return {"CPU": cpus, "GPU": float(owner.gpus)} if owner.gpus else {"CPU": cpus}


def _wait_until_placed(
    group: PlacementGroup, owners: Sequence[Role], timeout_s: float | None
) -> None:
    """Wait for GPUs or CPUs that others use, and say what is missing.

    Raises:
        ValueError: they are not free after `timeout_s` seconds; None waits for ever.
    """
    on_gpus = any(role.gpus for role in owners)
    kind = "GPUs" if on_gpus else "CPUs"
    cpus = sum(bundle["CPU"] for bundle in group.bundle_specs)
    wanted = describe_gpu_demand(owners) if on_gpus else f"the run needs {cpus:g} CPUs"
    start, pause = time.monotonic(), FIRST_LOOK_S
    limit = "for as long as it takes" if timeout_s is None else f"up to {timeout_s:g} s"
    while True:
        waited = time.monotonic() - start
        left = math.inf if timeout_s is None else timeout_s - waited
        if group.wait(max(0.0, min(pause, left))):
            return
        if left <= pause:
            break
        print(
            f"waiting for {kind}, {limit} (placement_timeout): {wanted}. {_free()}. "
            f"{waited + pause:.0f} s so far",
            flush=True,
        )
        pause = REPORT_EVERY_S
    remove_placement_group(group)  # or it takes what is free later
    remedies = "Free some, or set placement_timeout to wait"
    if on_gpus:
        wanted += ", and an engine's GPUs must be on one host"
        remedies = (
            "Free some, set placement_timeout to wait, or lower rollout.tensor_parallel_size, "
            "rollout.num_engines or policy.world_size, or raise rollout.engines_per_gpu"
        )
    raise ValueError(
        f"Ray could not place the run within {timeout_s:g} s: {wanted}. {_free()}. {remedies}"
    )


def _check_enough(roles: list[Role]) -> None:
    wanted, total = sum(role.gpus for role in roles), ray.cluster_resources().get("GPU", 0)
    if wanted > total:
        demand, remedy = describe_gpu_demand(roles), fewer_gpus(roles, int(total))
        raise ValueError(f"{demand}, and the Ray cluster has {total:g}: {remedy}")
    widest = max(role.gpus for role in roles)
    largest_host = max((node["Resources"].get("GPU", 0) for node in ray.nodes()), default=0)
    if widest > largest_host:
        raise ValueError(
            f"an engine's GPUs must be on one host, rollout.tensor_parallel_size = {widest}, and "
            f"the largest host of the Ray cluster has {largest_host:g}: lower tensor_parallel_size"
        )


def _free() -> str:
    free = available_resources_per_node()
    hosts = [
        f"{node['NodeManagerHostname']} {free.get(node['NodeID'], {}).get('GPU', 0):g} of {gpus:g}"
        for node in ray.nodes()
        if node["Alive"] and (gpus := node["Resources"].get("GPU", 0))
    ]
    gpus = f"Free GPUs: {', '.join(hosts)}; free" if hosts else "Free"
    cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return f"{gpus} CPUs: {cpus[0]:g} of {cpus[1]:g}"
