"""Which GPU each Ray actor gets: one placement group, with a bundle for each GPU.

Actors that share a GPU are in the same bundle. On CPU every actor has a bundle with a share of a
core; a full cluster may have no room for it.

The reference has its own GPUs or shares the policy's (reference.placement). The two never compute
at the same time, so sharing costs only the copies of its weights, which wait in host memory. Reward
models score while completions are sampled and the policy waits: they share its GPUs, where their
weights stay, or have their own (reward.reward_model_placement). Several rollout engines share a GPU
with rollout.engines_per_gpu. With `placement: colocated` engines are on the policy's GPUs: see
rlsys.actors.turns.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
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
from rlsys.config import RunConfig
from rlsys.config.roles import Role, RoleName, describe_gpu_demand, fewer_gpus, plan_roles
from rlsys.types import Device

FIRST_LOOK_S, REPORT_EVERY_S = 5.0, 30.0
"""Seconds until a line says what the run waits for, and between such lines."""


class Placement:
    """Ray options of every actor that holds a model.

    Raises:
        ValueError: the cluster has too few GPUs, too few free GPUs or CPUs, or too few on one host
            for an engine; the message says which role needs how many.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: Device,
        names: Collection[RoleName] = ("policy", "rollout", "reference", "reward_model"),
    ):
        """`names`: the roles that are started; an evaluation has neither policy nor reference."""
        roles = [role for role in plan_roles(config, device=device) if role.name in names]
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
        """The actor that owns the bundle: the role itself, or the one whose GPU it shares."""
        return role.shares_gpu_of or (role.name, role.rank)

    def _gpus(self, role: Role) -> float:
        """GPUs to request: 1/n if n actors share the bundle. Ray books it and limits nothing."""
        sharers = self._sharers[self._owner(role)]
        return 1 / sharers if sharers > 1 else role.gpus

    def _bundle(self, owner: Role) -> dict[str, float]:
        """Resources of an owner and of the actors that share its GPU."""
        cpus = CPU_SHARE * self._sharers[owner.name, owner.rank]
        return {"CPU": cpus, "GPU": float(owner.gpus)} if owner.gpus else {"CPU": cpus}


def _wait_until_placed(
    group: PlacementGroup, owners: Sequence[Role], timeout_s: float | None
) -> None:
    """Wait for GPUs or CPUs that others use, and say what is missing.

    Raises:
        ValueError: they are not free after `timeout_s` seconds; None waits without limit.
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
    remove_placement_group(group)  # otherwise it would take what becomes free later
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


def cluster_gpus() -> int:
    """All GPUs of the connected Ray cluster, free or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def _check_enough(roles: list[Role]) -> None:
    wanted, total = sum(role.gpus for role in roles), cluster_gpus()
    if wanted > total:
        demand, remedy = describe_gpu_demand(roles), fewer_gpus(roles, total)
        raise ValueError(f"{demand}, and the Ray cluster has {total}: {remedy}")
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
