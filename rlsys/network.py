"""Network interfaces of this host, and ports on which ranks meet."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

import psutil

LOOPBACK = "127.0.0.1"
_ANY_PORT = (0,)
_DISCARD = 9
"""A UDP port. Nothing is sent to it: connecting a UDP socket only asks the kernel for the route."""


def gloo_interfaces(address: str) -> list[str]:
    """Interfaces for gloo: those of GLOO_SOCKET_IFNAME, or the one through which `address` is.

    gloo itself takes the address of the host's own name, which on many systems is a loopback
    address that no other host reaches.

    Returns:
        names of interfaces; empty if the kernel knows no route.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return chosen.split(",")
    own = _own_address(address)
    return [
        name
        for name, entries in psutil.net_if_addrs().items()
        if own is not None and own in (entry.address.partition("%")[0] for entry in entries)
    ][:1]


def _own_address(address: str) -> str | None:
    """This host's address on the route to another one."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, _DISCARD, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def listen(address: str, ports: Iterable[int] | None = None) -> socket.socket:
    """A socket that listens on `address`, on the first free port of `ports`; None: on any.

    Raises:
        ValueError: all of the ports are in use.
    """
    tried = list(_ANY_PORT if ports is None else ports)
    for port in tried:
        try:
            return socket.create_server((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise ValueError(
        f"rendezvous_ports: all ports from {tried[0]} to {tried[-1]} are in use on {address}: give "
        "more ports. A run takes one for the policy, one for the reference and, for a moment, two "
        "for each weight sync connection"
    )
