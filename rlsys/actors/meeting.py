"""The hosts of a run's Ray cluster, and the address that this one announces to the others."""

from __future__ import annotations

from typing import Any

import ray

from rlsys.network import LOOPBACK


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes of the connected cluster, without those that died."""
    return [node for node in ray.nodes() if node["Alive"]]


def meeting_address() -> str:
    """This host's address as other hosts of the Ray cluster see it; loopback if it is alone.

    It is the address that Ray has for the node: that of the interface through which the node
    reaches the head, or of `ray start --node-ip-address`.
    """
    return LOOPBACK if len(alive_nodes()) == 1 else ray.util.get_node_ip_address()
