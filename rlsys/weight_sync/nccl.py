"""Weight transport over NCCL: from a GPU of the policy to GPUs of the rollout engines."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlsys.weight_sync.transport import Transport, transports


@transports.register("nccl")
class NcclTransport(Transport):
    """An NCCL process group of its own, beside the default one that the process may have.

    A broadcast runs on its own stream. It starts after all work that the current stream holds, and
    work that the current stream gets after the wait starts after the broadcast. So a bucket is
    never sent before it is packed, never read before it has arrived, and never overwritten while
    it is in use. Between the two calls other buckets are packed or loaded.
    """

    _group: Any = None  # ProcessGroupNCCL, which a torch built for CPU does not have

    @property
    def buffer_device(self) -> torch.device:
        """The GPU of this rank."""
        return self.device

    def _join(self, store: dist.Store, timeout: timedelta) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._group = dist.ProcessGroupNCCL(store, self._rank, self._connection.world_size, options)
        # The first collective makes the communicator: a rank that cannot join is found here.
        self._begin_broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device))()
        torch.cuda.synchronize()

    def _begin_broadcast(self, buffer: torch.Tensor) -> Callable[[], None]:
        assert self._group is not None, "connect first"
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._group.broadcast([buffer], options).wait
