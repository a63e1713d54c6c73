"""The interface of weight transports: ranks that wait for each other, and broadcasts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from rlsys.network import LOOPBACK as LOOPBACK
from rlsys.network import listen
from rlsys.problems import RunFailed
from rlsys.registry import Registry
from rlsys.weight_sync.connection import Connection

EXTRA_RECEIVER_S = 2.0
"""Extra seconds receivers wait, so that the sender times out first: only it can name the missing
rank."""


class WeightSyncError(RunFailed):
    """A weight sync failed; the message names the rank, the phase and, if known, the bucket."""


class Transport(ABC):
    """One rank's end of a connection.

    Ranks wait for each other through a TCPStore on the host, and send over their own kind of
    network. A new transport is one file with one class, registered by name and imported in
    `make_transport`. It knows no Ray, no vLLM and no megatron.

    Args:
        device: where this rank's model is.
    """

    def __init__(self, device: torch.device):
        self.device = device

    @property
    @abstractmethod
    def buffer_device(self) -> torch.device:
        """Where the buffers of `broadcast` have to be."""

    def sending_memory(self, num_buffers: int, nbytes: int) -> torch.Tensor:
        """Zeros [num_buffers, nbytes] uint8, whose parts rank 0 may `broadcast`."""
        return torch.zeros(num_buffers, nbytes, dtype=torch.uint8, device=self.buffer_device)

    def connect(
        self, connection: Connection, rank: int, memory: torch.Tensor | None = None
    ) -> None:
        """Become rank `rank` of a connection, and wait until the other ranks are there.

        Args:
            memory: from `sending_memory`, on rank 0. A transport may share it with the receivers.

        Raises:
            WeightSyncError: not all ranks came within `connection.timeout_s`.
        """
        assert 0 <= rank < connection.world_size, (rank, connection.world_size)
        self._connection, self._rank, self._memory = connection, rank, memory
        address, port = connection.address, connection.port
        timeout = timedelta(seconds=connection.timeout_s)
        with self._explain_failure(f"connecting to {address}:{port}", since=time.monotonic()):
            # Two clients: a client is busy while it waits, and torch uses its own in other threads.
            own, torchs = (
                dist.TCPStore(address, port, is_master=False, timeout=timeout) for _ in range(2)
            )
            self._store = dist.PrefixStore("rlsys", own)
            self._num_barriers = 0
            self._join(dist.PrefixStore("torch", torchs), timeout)

    @abstractmethod
    def _join(self, store: dist.Store, timeout: timedelta) -> None:
        """Join a process group over this kind of network; it may use `store` as it likes."""

    def barrier(self, number: int, *, what: str) -> int:
        """Wait on the host until every rank is here; nothing runs on a GPU meanwhile.

        Returns:
            The `number` of rank 0, on all ranks.

        Raises:
            WeightSyncError: not all ranks came within the deadline. The message contains `what`,
                and the connection cannot be used any more.
        """
        index = self._num_barriers
        self._num_barriers += 1
        with self._explain_failure(what, since=time.monotonic()):
            if self._rank > 0:
                self._store.set(f"{index}/{self._rank}", "")
                key, patience_s = f"{index}/number", self._connection.timeout_s + EXTRA_RECEIVER_S
                self._store.wait([key], timedelta(seconds=patience_s))
                return int(self._store.get(key))
            receivers = range(1, self._connection.world_size)
            self._wait_for({f"{index}/{rank}": rank for rank in receivers})
            self._store.set(f"{index}/number", str(number))
            if index > 0:  # all ranks have left the barrier before
                for key in ["number", *receivers]:
                    self._store.delete_key(f"{index - 1}/{key}")
        return number

    def _wait_for(self, ranks: Mapping[str, int]) -> None:
        try:
            self._store.wait(list(ranks))
        except dist.DistStoreError as error:
            missing = [str(rank) for key, rank in ranks.items() if not self._store.check([key])]
            raise RuntimeError(f"without rank {', '.join(missing)}") from error

    def broadcast(self, buffer: torch.Tensor, *, what: str) -> Callable[[], None]:
        """Begin to send `buffer` [nbytes] uint8 from rank 0 into that of all other ranks.

        On a GPU it begins after the work that the current stream holds now.

        Returns:
            A function to call before `buffer` is read (on receivers) or overwritten. Work after
            that call, on a GPU in the current stream, comes after the broadcast.

        Raises:
            WeightSyncError: here or in the returned function. The message contains `what`, and the
                connection cannot be used any more. On a GPU the stream waits, not the host: torch
                ends this process if a rank does not come before the deadline.
        """
        start = time.monotonic()
        with self._explain_failure(what, since=start):
            wait = self._begin_broadcast(buffer)

        def explained_wait() -> None:
            with self._explain_failure(what, since=start):
                wait()

        return explained_wait

    @abstractmethod
    def _begin_broadcast(self, buffer: torch.Tensor) -> Callable[[], None]:
        """`broadcast` over this kind of network; the caller explains torch's errors."""

    @property
    def name(self) -> str:
        """This rank's name in errors, once it is connected."""
        connection = self._connection
        return f"weight sync rank {self._rank} of {connection.world_size}{connection.label}"

    @contextmanager
    def _explain_failure(self, phase: str, *, since: float) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch raises nothing more specific
            seconds, timeout_s = time.monotonic() - since, self._connection.timeout_s
            if seconds >= timeout_s:
                reason = f"another rank did not take part within {timeout_s:g} s"
            else:
                reason = f"failed after {seconds:.1f} s"
            raise WeightSyncError(f"{self.name}, {phase}: {reason} ({error})") from error


transports: Registry[type[Transport]] = Registry("weight transport")


def make_transport(name: str, device: torch.device) -> Transport:
    """The transport of that name, not yet connected; "auto" is gloo on CPU and nccl on GPUs.

    Raises:
        ValueError: no transport has that name.
    """
    from rlsys.weight_sync import gloo, ipc, nccl  # noqa: F401  they register themselves

    if name == "auto":
        name = "gloo" if device.type == "cpu" else "nccl"
    return transports[name](device)


def serve_store(
    address: str, timeout_s: float, ports: Iterable[int] | None = None
) -> dist.TCPStore:
    """A store on `address`, through which ranks find each other.

    It listens on the first free port of `ports`, or on any. Raises ValueError if none is free.
    """
    listener = listen(address, ports)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
