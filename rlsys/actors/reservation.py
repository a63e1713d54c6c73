"""Reserving GPUs on the nodes of a Ray cluster, all at once or none, and waiting for them.

Ray packs bundles into few nodes, but it may cut a tensor-parallel group in two: it knows bundles,
not groups, and one bundle of several GPUs would let Ray mix up who shares which of them. So on GPUs
the node of each bundle is chosen here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rlsys.actors.meeting import alive_nodes
from rlsys.config import RunConfig
from rlsys.config.roles import Role, describe_gpu_demand, fewer_gpus
from rlsys.cores import usable_cores

FIRST_LOOK_S, REPORT_EVERY_S = 5.0, 30.0
"""Seconds until a line says what the run waits for, and between such lines."""
LOOK_EVERY_S = 1
"""Seconds between two looks at which GPUs are free; a whole number, as Ray cuts off the rest."""
PATIENCE_S = 5.0
"""Seconds that Ray has to reserve what was free. Then others have it: other nodes may be chosen.
A placement group that was removed while Ray made it has been seen to keep its GPUs."""


def cluster_gpus() -> int:
    """All GPUs of the connected Ray cluster, free or not."""
    return int(ray.cluster_resources().get("GPU", 0))


def node_cores() -> int:
    """CPU cores that every node of the connected cluster gives which gives any; at least 1.

    The driver's own limit counts, too: Ray does not see that a job may use some cores only.
    """
    given = [node["Resources"].get("CPU", 0) for node in alive_nodes()]
    return max(1, int(min([usable_cores(), *(cpus for cpus in given if cpus >= 1)])))


def choose_nodes(sizes: Sequence[int], free: Mapping[str, int]) -> list[str] | None:
    """A node for each group of GPUs, on few nodes; None if they do not fit.

    The largest groups go first. That finds a way if there is one, as long as each size divides the
    next larger one, which powers of two do.

    Args:
        sizes: GPUs of each group.
        free: node -> its free GPUs.
    """
    chosen: dict[int, str] = {}
    nodes, left = dict(free), sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while left:
        wanted = sum(sizes[i] for i in left)
        fitting = [node for node, room in nodes.items() if room >= wanted]
        if not nodes:
            return None
        node = min(fitting, key=nodes.__getitem__) if fitting else max(nodes, key=nodes.__getitem__)
        room = nodes.pop(node)
        for i in list(left):
            if sizes[i] <= room:
                chosen[i] = node
                room -= sizes[i]
                left.remove(i)
    return [chosen[i] for i in range(len(sizes))]


def reserve(
    bundles: list[dict[str, float]],
    owners: Sequence[Role],
    groups: Sequence[Sequence[Role]],
    *,
    timeout_s: float | None,
    limited_by: str = "placement_timeout",
) -> PlacementGroup:
    """Wait for GPUs or CPUs that others use, and say what is missing.

    Args:
        bundles: Ray's resources of each owner.
        owners: roles with a bundle.
        groups: owners that have to be on one node; empty on CPU.
        timeout_s: most seconds to wait.
        limited_by: the field that says so.

    Raises:
        ValueError: they are not free after `timeout_s` seconds; None waits without limit.
    """
    kind = "GPUs" if groups else "CPUs"
    cpus = sum(bundle["CPU"] for bundle in bundles)
    wanted = describe_gpu_demand(owners) if groups else f"the run needs {cpus:g} CPUs"
    reservation = _Reservation(bundles, owners, groups)
    start, pause = time.monotonic(), FIRST_LOOK_S
    limit = "for as long as it takes" if timeout_s is None else f"up to {timeout_s:g} s"
    while True:
        waited = time.monotonic() - start
        left = math.inf if timeout_s is None else timeout_s - waited
        made = reservation.wait(max(0.0, min(pause, left)))
        if made is not None:
            return made
        if left <= pause:
            break
        print(
            f"waiting for {kind}, {limit} ({limited_by}): {wanted}. {_free()}. "
            f"{waited + pause:.0f} s so far",
            flush=True,
        )
        pause = REPORT_EVERY_S
    reservation.drop()
    remedies = f"Free some, or let {limited_by} wait longer"
    if groups:
        wanted += _on_one_host(groups)
        remedies = (
            f"Free some, let {limited_by} wait longer, or lower rollout.tensor_parallel_size, "
            "rollout.num_engines or policy.world_size, or raise rollout.engines_per_gpu"
        )
    raise ValueError(
        f"Ray could not place the run within {timeout_s:g} s: {wanted}. {_free()}. {remedies}"
    )


class _Reservation:
    """A placement group that Ray may not have made yet; see `reserve` for the arguments."""

    def __init__(
        self,
        bundles: list[dict[str, float]],
        owners: Sequence[Role],
        groups: Sequence[Sequence[Role]],
    ):
        self._bundles, self._owners, self._groups = bundles, owners, groups
        self._sizes = [sum(role.gpus for role in group) for group in groups]
        self._nodes: list[str] | None = None
        self._made: PlacementGroup | None = None
        self._since = 0.0

    def wait(self, seconds: float) -> PlacementGroup | None:
        """The placement group, as soon as Ray has made it; None if it has not by then."""
        deadline = time.monotonic() + seconds
        while True:
            self._choose()
            if self._made is None:
                time.sleep(min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))
            elif self._made.wait(LOOK_EVERY_S):
                return self._made
            if time.monotonic() >= deadline:
                return None

    def drop(self) -> None:
        """Stop waiting; otherwise Ray would take what becomes free later."""
        if self._made is not None:
            remove_placement_group(self._made)
            self._made = None

    def _choose(self) -> None:
        """Ask Ray for nodes where the run fits now, other ones if the last choice took too long."""
        if self._made is not None and time.monotonic() < self._since + PATIENCE_S:
            return
        nodes = choose_nodes(self._sizes, _free_gpus())
        if nodes is None or (self._made is not None and nodes == self._nodes):
            return
        self.drop()
        self._nodes, self._since = nodes, time.monotonic()
        of_role = {
            (role.name, role.rank): node
            for group, node in zip(self._groups, nodes, strict=True)
            for role in group
        }
        chosen = [of_role.get((role.name, role.rank)) for role in self._owners]
        self._made = placement_group(
            self._bundles,
            strategy="PACK",
            bundle_label_selector=[{NODE_ID_LABEL_KEY: node} for node in chosen if node] or None,
        )


def check_enough(config: RunConfig, owners: list[Role], groups: Sequence[Sequence[Role]]) -> None:
    """Refuse a run that would not fit if all GPUs of the cluster were free.

    Raises:
        ValueError: too few GPUs in all, or on one host.
    """
    wanted, total = sum(role.gpus for role in owners), cluster_gpus()
    if wanted > total:
        demand, remedy = describe_gpu_demand(owners), fewer_gpus(config, owners, total)
        raise ValueError(f"{demand}, and the Ray cluster has {total}: {remedy}")
    hosts = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in alive_nodes()}
    if choose_nodes([sum(role.gpus for role in group) for group in groups], hosts) is None:
        sizes = ", ".join(str(gpus) for gpus in sorted(hosts.values(), reverse=True) if gpus)
        raise ValueError(
            f"{describe_gpu_demand(owners)}{_on_one_host(groups)}. The hosts of the Ray cluster "
            f"have {sizes} GPUs: lower tensor_parallel_size, or use hosts with more GPUs"
        )


def _on_one_host(groups: Sequence[Sequence[Role]]) -> str:
    """Which groups of several GPUs have to be on one host, as the end of a sentence."""
    wide = {group[0].name: sum(role.gpus for role in group) for group in groups}
    parts = [
        f"the {gpus} of {'an engine' if name == 'rollout' else f'a {name} group'} "
        f"({name}.tensor_parallel_size)"
        for name, gpus in wide.items()
        if gpus > 1
    ]
    return f", and {', and '.join(parts)} must be on one host" if parts else ""


def _free_gpus() -> dict[str, int]:
    """Node id -> GPUs of which nobody has reserved a part."""
    free = available_resources_per_node()
    return {n["NodeID"]: int(free.get(n["NodeID"], {}).get("GPU", 0)) for n in alive_nodes()}


def lost_node() -> str:
    """What actors of this run wait for whose node was lost; empty if all can be placed.

    Ray places them by itself when a node joins that has room.
    """
    if not ray.is_initialized():
        return ""
    job = ray.get_runtime_context().get_job_id()
    groups = placement_group_table().values()
    own = [group for group in groups if group["placement_group_id"].endswith(job)]
    if not any(group["state"] == "RESCHEDULING" for group in own):
        return ""
    return f"its node is lost, and no other one has room for it. {_free()}"


def _free() -> str:
    free = available_resources_per_node()
    hosts = [
        f"{node['NodeManagerHostname']} {free.get(node['NodeID'], {}).get('GPU', 0):g} of {gpus:g}"
        for node in alive_nodes()
        if (gpus := node["Resources"].get("GPU", 0))
    ]
    gpus = f"Free GPUs: {', '.join(hosts)}; free" if hosts else "Free"
    cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    return f"{gpus} CPUs: {cpus[0]:g} of {cpus[1]:g}"
