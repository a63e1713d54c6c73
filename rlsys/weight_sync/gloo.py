"""Weight transport over gloo: TCP between processes on one or several hosts, via CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from rlsys.network import gloo_interfaces
from rlsys.weight_sync.transport import Transport, transports


@transports.register("gloo")
class GlooTransport(Transport):
    """A gloo process group of its own, beside the default one that the process may have."""

    _group: dist.ProcessGroupGloo | None = None

    @property
    def buffer_device(self) -> torch.device:
        """The CPU, whatever the model's device is."""
        return torch.device("cpu")

    def _join(self, store: dist.Store, timeout: timedelta) -> None:
        # torch's type stubs lack `_Options` and, below, `broadcast`.
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._threads = 1
        options._devices = _network_devices(self._connection.address)
        self._group = dist.ProcessGroupGloo(store, self._rank, self._connection.world_size, options)

    def _begin_broadcast(self, buffer: torch.Tensor) -> Callable[[], None]:
        assert self._group is not None, "connect first"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([buffer], options)  # type: ignore[attr-defined]
        return work.wait


def _network_devices(address: str) -> list[dist.ProcessGroupGloo.Device]:
    """Those that GLOO_SOCKET_IFNAME names, or the one through which `address` is reached."""
    gloo = dist.ProcessGroupGloo
    names = gloo_interfaces(address)
    return [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]
