"""Copies of objects on other nodes than their own, so that a node that is lost takes none along."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Keeper:
    """Holds an object in the shared memory of its node."""

    def keep(self, held: object) -> None:
        """Hold this, and the one before no longer. Ray has brought it to this node."""
        self._held = held


class Keepers:
    """One keeper for each name, on another node than where the object is made; none on one node.

    The owner of the object's reference, which is the driver, finds the copy by itself.
    """

    def __init__(self) -> None:
        self._keepers: dict[str, tuple[str, Any]] = {}
        """Name -> node, actor."""

    def keep(self, name: str, ref: ray.ObjectRef, *, node: str) -> None:
        """Start to copy an object, which replaces the last one of this name.

        Args:
            node: id of the node that has it.
        """
        place, keeper = self._keepers.get(name, (node, None))
        if keeper is None or place == node or place not in _nodes():
            others = sorted(other for other in _nodes() if other != node)
            if not others:
                return
            place = others[len(self._keepers) % len(others)]
            strategy = NodeAffinitySchedulingStrategy(place, soft=False)
            keeper = ray.remote(Keeper).options(num_cpus=0, scheduling_strategy=strategy).remote()
            self._keepers[name] = place, keeper
        keeper.keep.remote(ref)


def _nodes() -> set[str]:
    """The living nodes that run actors."""
    return {n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0)}
