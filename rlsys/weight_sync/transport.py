"""The one interface of weight transports: a group of ranks, and a broadcast from rank 0."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from rlsys.problems import RunFailed
from rlsys.registry import Registry
from rlsys.weight_sync.connection import Connection

LOOPBACK = "127.0.0.1"
PATIENCE_S = 2.0
"""A receiver waits so much longer for the sender than the sender for it: a receiver that is missing
is then told by the sender, which knows who it is, and not by one that came."""


class WeightSyncError(RunFailed):
    """A weight sync failed; the message names the rank, the phase and, if known, the bucket."""


class Transport(ABC):
    """Rank 0 is the policy's sender; each process that it sends to is one more rank.

    Ranks meet on the host, through a TCPStore, and send over a network of its kind. A new transport
    is one file with one class, registered by name and imported in `make_transport`. It knows no
    Ray, no vLLM and no megatron.
    """

    group_name = ""
    """Of the group, in errors; see Connection.name_of."""

    def __init__(self, device: torch.device):
        self.device = device
        """Where this rank's model lives."""

    @property
    @abstractmethod
    def buffer_device(self) -> torch.device:
        """Where the buckets that `broadcast` takes have to be."""

    def connect(
        self, address: str, port: int, *, rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Join the others at the TCPStore on `address`:`port`; see Connection.

        Raises:
            WeightSyncError: not all ranks came within `timeout_s` seconds, which is the deadline
                of every later meeting and broadcast too.
        """
        self._address, self._timeout_s = address, timeout_s
        self._rank, self._world_size = rank, world_size
        timeout = timedelta(seconds=timeout_s)
        with self._failures_explained(f"connecting to {address}:{port}", since=time.monotonic()):
            # Two clients: one is busy while it waits, and torch asks its own from other threads.
            ours, torchs = (
                dist.TCPStore(address, port, is_master=False, timeout=timeout) for _ in range(2)
            )
            self._store = dist.PrefixStore("rlsys", ours)
            self._num_meetings = 0
            self._join(dist.PrefixStore("torch", torchs), timeout)

    @abstractmethod
    def _join(self, store: dist.Store, timeout: timedelta) -> None:
        """`connect` for one kind of network; the group uses `store` as it likes."""

    def meet(self, number: int, *, what: str) -> int:
        """Wait for every other rank to be here, with nothing running on a GPU meanwhile.

        Returns:
            `number` of rank 0, on all of them.

        Raises:
            WeightSyncError: not all came within the deadline, with `what` in its message; the
                group cannot be used any more.
        """
        meeting = self._num_meetings
        self._num_meetings += 1
        others = range(1, self._world_size)
        with self._failures_explained(what, since=time.monotonic()):
            if self._rank > 0:
                self._store.set(f"{meeting}/{self._rank}", "")
                key, patience_s = f"{meeting}/number", self._timeout_s + PATIENCE_S
                self._store.wait([key], timedelta(seconds=patience_s))
                return int(self._store.get(key))
            self._wait_for({f"{meeting}/{rank}": rank for rank in others})
            self._store.set(f"{meeting}/number", str(number))
            if meeting > 0:  # nobody is at the one before, as all are here
                for key in ["number", *others]:
                    self._store.delete_key(f"{meeting - 1}/{key}")
        return number

    def _wait_for(self, ranks: Mapping[str, int]) -> None:
        try:
            self._store.wait(list(ranks))
        except dist.DistStoreError as error:
            missing = [str(rank) for key, rank in ranks.items() if not self._store.check([key])]
            raise RuntimeError(f"without rank {', '.join(missing)}") from error

    def broadcast(self, buffer: torch.Tensor, *, what: str) -> Callable[[], None]:
        """Begin to send `buffer` [nbytes] uint8 on rank 0, to fill it on the others.

        On a GPU it begins when the work is done that the current stream holds now.

        Returns:
            what to call before `buffer` is read (on the other ranks) or overwritten: work that
            follows the call, on a GPU in the current stream, comes after the broadcast.

        Raises:
            WeightSyncError: here or in the returned function, with `what` in its message; the
                group cannot be used any more. On a GPU the stream waits and not the host: there
                a rank that does not come ends this process, when the deadline is over.
        """
        start = time.monotonic()
        with self._failures_explained(what, since=start):
            wait = self._begin_broadcast(buffer)

        def wait_explained() -> None:
            with self._failures_explained(what, since=start):
                wait()

        return wait_explained

    @abstractmethod
    def _begin_broadcast(self, buffer: torch.Tensor) -> Callable[[], None]:
        """`broadcast` for one kind of network; torch's own errors are explained around it."""

    @property
    def name(self) -> str:
        """This rank as errors tell of it, once it is connected."""
        return f"weight sync rank {self._rank} of {self._world_size}{self.group_name}"

    @contextmanager
    def _failures_explained(self, phase: str, *, since: float) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch raises nothing more specific
            seconds = time.monotonic() - since
            if seconds >= self._timeout_s:
                reason = f"another rank did not take part within {self._timeout_s:g} s"
            else:
                reason = f"failed after {seconds:.1f} s"
            raise WeightSyncError(f"{self.name}, {phase}: {reason} ({error})") from error


transports: Registry[type[Transport]] = Registry("weight transport")


def join(connection: Connection, rank: int, device: torch.device, *, group: int = 0) -> Transport:
    """Become rank `rank` of weight sync group `group`, with a model on `device`.

    Raises:
        ValueError: there is no such transport.
        WeightSyncError: not all ranks came in time.
    """
    assert 0 <= rank < connection.world_size, (rank, connection.world_size)
    transport = make_transport(connection.transport, device)
    transport.group_name = connection.name_of(group)
    transport.connect(
        connection.address,
        connection.ports[group],
        rank=rank,
        world_size=connection.world_size,
        timeout_s=connection.timeout_s,
    )
    return transport


def make_transport(name: str, device: torch.device) -> Transport:
    """The transport of that name; "auto" is gloo on CPU and nccl on GPUs."""
    from rlsys.weight_sync import gloo, nccl  # noqa: F401  they register themselves

    if name == "auto":
        name = "gloo" if device.type == "cpu" else "nccl"
    return transports[name](device)


def serve_store(address: str, timeout_s: float) -> dist.TCPStore:
    """A store on a free port of `address`, at which the ranks meet."""
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
