"""Which GPU each Ray actor gets: one placement group, with a bundle for each GPU.

Actors that share a GPU are in the same bundle. On CPU every actor has a bundle with a share of a
core; a full cluster may have no room for it. rlsys.actors.reservation chooses nodes and waits.

The reference has its own GPUs or shares the policy's (reference.placement), and so has the teacher.
They never compute at the same time as the policy, so sharing costs only the copies of their
weights, which wait in host memory. Reward
models score while completions are sampled and the policy waits: they share its GPUs, where their
weights stay, or have their own (reward.reward_model_placement). Several rollout engines share a GPU
with rollout.engines_per_gpu. With `placement: colocated` engines are on the policy's GPUs: see
rlsys.actors.turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from rlsys.actors.group import CPU_SHARE
from rlsys.actors.meeting import alive_nodes
from rlsys.actors.ray_env import wait_for_cluster
from rlsys.actors.reservation import check_enough, reserve
from rlsys.attempts import is_restarted
from rlsys.config import RunConfig
from rlsys.config.roles import Role, RoleName, groups_on_one_node, plan_roles
from rlsys.types import Device


class Placement:
    """Ray options of every actor that holds a model.

    Raises:
        ValueError: the cluster has too few GPUs, too few free GPUs or CPUs, or too few on one host
            for an engine or a tensor-parallel group; the message says which role needs how many.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: Device,
        names: Collection[RoleName] = ("policy", "rollout", "reference", "teacher", "reward_model"),
    ):
        """`names`: the roles that are started; an evaluation has neither policy nor reference."""
        roles = [role for role in plan_roles(config, device=device) if role.name in names]
        self._roles = {(role.name, role.rank): role for role in roles}
        self._sharers = Counter(map(self._owner, roles))
        self._has_rewards = config.has_rollouts
        owners = [role for role in roles if role.shares_gpu_of is None]
        groups = groups_on_one_node(config, owners) if device == "cuda" else []
        # Nodes that were lost may come back.
        patience_s = config.recovery.wait_for_resources_s if is_restarted() else 0.0
        if device == "cuda":
            wait_for_cluster(partial(check_enough, config, owners, groups), patience_s)
        self._bundles = {(role.name, role.rank): i for i, role in enumerate(owners)}
        timeout_s, limited_by = config.placement_timeout, "placement_timeout"
        if isinstance(timeout_s, float) and timeout_s < patience_s:
            timeout_s, limited_by = patience_s, "recovery.wait_for_resources_s"
        self._group = reserve(
            [self._bundle(role) for role in owners],
            owners,
            groups,
            timeout_s=timeout_s if isinstance(timeout_s, float) else None,
            limited_by=limited_by,
        )
        nodes = self._nodes_of_bundles()
        self._nodes = {who: nodes[bundle] for who, bundle in self._bundles.items()}

    def _nodes_of_bundles(self) -> dict[int, str]:
        """Bundle -> node. A bundle of a node that is lost moves as soon as there is room."""
        nodes: dict[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return nodes

    def _reward_nodes(self) -> list[str]:
        """Nodes of the other roles that live, and the driver's if it has CPUs."""
        nodes = _with_drivers(list(dict.fromkeys(self._nodes_of_bundles().values())))
        living = {node["NodeID"] for node in alive_nodes()}
        return [node for node in nodes if node in living]

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

    def reward_options(self, number: int) -> dict[str, Any]:
        """Ray options of the process that is started as number `number` for reward functions.

        They take turns on the nodes of the other roles: Ray alone would fill one node first.
        """
        nodes = self._reward_nodes()
        if not nodes:  # all are lost: it waits for the next one
            return {"num_cpus": CPU_SHARE}
        strategy = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)
        # A share of a core might be free on another node only.
        return {"num_cpus": 0, "scheduling_strategy": strategy}

    def roles_of_nodes(self) -> dict[str, set[RoleName]]:
        """Node id -> roles that run there."""
        reward_nodes = self._reward_nodes() if self._has_rewards else []
        found: dict[str, set[RoleName]] = {node: {"reward"} for node in reward_nodes}
        for role in self._roles.values():
            found.setdefault(self._nodes[self._owner(role)], set()).add(role.name)
        return found

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


def _with_drivers(nodes: list[str]) -> list[str]:
    """`nodes`, and the driver's unless it was started without CPUs."""
    own = ray.get_runtime_context().get_node_id()
    has_cpus = any(n["NodeID"] == own and n["Resources"].get("CPU", 0) for n in ray.nodes())
    return [own, *nodes] if has_cpus and own not in nodes else nodes
