"""Where the processes of a run meet: the address that this host announces to the others."""

from __future__ import annotations

import ray

from rlsys.network import LOOPBACK


def meeting_address() -> str:
    """This host's address as other hosts of the Ray cluster see it; loopback if it is alone.

    It is the address that Ray has for the node: that of the interface through which the node
    reaches the head, or of `ray start --node-ip-address`.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    return LOOPBACK if len(alive) == 1 else ray.util.get_node_ip_address()
