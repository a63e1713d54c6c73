"""The driver's side of weight sync: who does what when, with a deadline on every wait."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ray
from torch.distributed import TCPStore

from rlsys.actors.group import get_all
from rlsys.config import WeightSyncConfig
from rlsys.weight_sync.connection import Connection, whole_tensors
from rlsys.weight_sync.plan import TensorMeta, TensorSlice
from rlsys.weight_sync.transport import LOOPBACK, WeightSyncError, serve_store

if TYPE_CHECKING:
    Refs = dict[str, ray.ObjectRef]  # actor name -> reference, in rank order

# A rank that waits for another gives up after timeout_s and says who and where it was, and the
# driver waits this much longer, so that its own, less specific, deadline comes second. Once buckets
# travel over NCCL nobody waits on the host: torch ends a process whose transfer took too long.
GRACE_S = 5.0


class Sender(Protocol):
    """What weight sync needs of the policy."""

    policy_version: int

    def weight_metadata(self) -> Sequence[TensorMeta]:
        """Every exported tensor, in the order in which it is sent."""

    def senders_of_shards(self, number: int) -> list[int]:
        """The rank that sends to each worker of engines which have `number` of them."""

    def async_connect_weight_sync(self, connections: Sequence[Connection], *, to: str) -> Refs:
        """The sender of each connection joins all its groups as their rank 0, in this order.

        `to` tells receivers apart; connections to the same ones take the place of those before.
        """

    def async_send_weights(self, version: int, *, to: str) -> Refs:
        """The results are how long the transports took on each rank, in seconds."""


class Receivers(Protocol):
    """What weight sync needs of the rollout engines."""

    num_workers: int
    """Processes that hold a model, over all engines."""
    num_sync_groups: int
    """Weight sync groups that they join, equally many each; see Connection."""

    def async_connect_weight_sync(self, connection: Connection) -> Refs:
        """Every worker joins its weight sync group."""

    def async_needed_slices(self) -> Refs:
        """For every engine a list of what its workers have to be sent, in the order of the tensors.

        None for a worker that needs whole tensors; no engine where none would do with less.
        """

    def async_connect_shards(self, connections: Sequence[Connection]) -> Refs:
        """Every worker leaves its group for that of its connection, with others of its place."""

    def async_start_weight_update(self) -> Refs:
        """Stop sampling."""

    def async_update_weights(self, policy_version: int) -> Refs:
        """Receive, compare checksums, and sample with the new weights.

        The results are the versions that the engines hold. Asked for right after
        `async_start_weight_update`, whose end it does not wait for: an engine has to see to it that
        it has paused before.
        """


class WeightPublisher:
    """Pushes the policy's weights to every rollout engine.

    Connects all sides when created, and once more after the first `publish` if workers hold shards.

    Args:
        policy: sends.
        rollout_engines: receive; the reference may, when it is refreshed.
        config: how.
        to: tells several receivers of one policy apart.
        transport: name of the registered transport; None is that of the config.

    Raises:
        ActorFailure, PhaseTimeout: a rank failed or did not answer in time.
    """

    def __init__(
        self,
        policy: Sender,
        rollout_engines: Receivers,
        config: WeightSyncConfig,
        *,
        to: str = "rollout",
        transport: str | None = None,
    ):
        self._policy = policy
        self._to = to
        self._engines = rollout_engines
        self._config = config
        metadata = policy.weight_metadata()
        self._bytes = sum(meta.nbytes for meta in metadata)
        self._transport = transport or config.transport
        self._stores: list[TCPStore] = []
        self._has_asked_for_shards = False
        groups = rollout_engines.num_sync_groups
        whole = self._connection(
            whole_tensors(metadata),
            sender=0,
            num_groups=groups,
            world_size=1 + rollout_engines.num_workers // groups,
        )
        receivers = rollout_engines.async_connect_weight_sync(whole)
        self._connect([whole], receivers)

    def _connection(
        self,
        slices: Sequence[TensorSlice],
        *,
        sender: int,
        num_groups: int,
        world_size: int,
        shard: str = "",
    ) -> Connection:
        config, address = self._config, _meeting_address()
        stores = [serve_store(address, config.timeout_s) for _ in range(num_groups)]
        self._stores += stores  # which live as long as it: ranks meet there at every update
        return Connection(
            slices=tuple(slices),
            sender=sender,
            transport=self._transport,
            address=address,
            ports=tuple(store.port for store in stores),
            world_size=world_size,
            bucket_bytes=config.bucket_mb * 2**20,
            verify=config.verify,
            in_place=config.in_place,
            timeout_s=config.timeout_s,
            shard=shard,
        )

    def _connect(self, connections: Sequence[Connection], receivers: Refs) -> None:
        senders = self._policy.async_connect_weight_sync(connections, to=self._to)
        self._wait(senders | receivers, "connecting")
        self._sent_bytes = [
            sum(c.nbytes * len(c.ports) for c in connections if c.sender == rank)
            for rank in range(len(senders))
        ]

    def _connect_shards(self) -> None:
        """Send each worker of an engine what it holds, and no more, from the next update on.

        Where engines have one worker, or vLLM's loader needs whole tensors, nothing changes.
        """
        self._has_asked_for_shards = True
        needed = self._wait(self._engines.async_needed_slices(), "planning")
        if not needed or None in needed[0] or any(engine != needed[0] for engine in needed):
            return
        number = len(needed[0])
        if number == 1:
            return
        senders = self._policy.senders_of_shards(number)
        stores_before, self._stores = self._stores, []
        connections = [
            self._connection(
                shard,
                sender=sender,
                num_groups=1,
                world_size=1 + len(needed),
                shard=f" for worker {worker} of {number}",
            )
            for worker, (shard, sender) in enumerate(zip(needed[0], senders, strict=True))
        ]
        self._connect(connections, self._engines.async_connect_shards(connections))
        stores_before.clear()  # which everybody has left by now

    def publish(self) -> dict[str, float]:
        """Send the weights of `policy.policy_version`; returns when every engine samples with them.

        Everything is asked for at once: an engine pauses sampling, receives, compares checksums,
        resets its prefix cache and resumes, while the sender already packs the first bucket.

        Raises:
            WeightSyncError: an engine reports another version.
            ActorFailure, PhaseTimeout: a rank failed, which an engine does that received other
                bytes than were sent, or did not answer in time.
        """
        start = time.monotonic()
        version = self._policy.policy_version
        pausing = self._engines.async_start_weight_update()
        senders = self._policy.async_send_weights(version, to=self._to)
        receivers = self._engines.async_update_weights(version)
        # No grace: where an engine cannot pause, ranks that wait for it give up at the same time.
        self._wait(pausing, "pausing rollouts", grace_s=0.0)
        results = self._wait(senders | receivers, "transfer")
        for engine, held in zip(receivers, results[len(senders) :], strict=True):
            if held != version:
                raise WeightSyncError(
                    f"{engine} holds weight version {held} after version {version} was published"
                )
        seconds = time.monotonic() - start
        transport_seconds, sent_bytes = max(
            zip(results[: len(senders)], self._sent_bytes, strict=True)
        )
        if not self._has_asked_for_shards:  # what engines need is known once they have loaded
            self._connect_shards()
        return {
            "weight_sync/bytes": float(self._bytes),
            "weight_sync/seconds": seconds,
            "weight_sync/mb_per_s": self._bytes / 1e6 / seconds,
            "weight_sync/transport_seconds": transport_seconds,
            "weight_sync/transport_gb_per_s": sent_bytes / 1e9 / transport_seconds,
        }

    def _wait(self, refs: Refs, phase: str, *, grace_s: float = GRACE_S) -> list[Any]:
        timeout_s = self._config.timeout_s + grace_s
        return get_all(refs, phase=f"weight sync, {phase}", timeout_s=timeout_s)


def _meeting_address() -> str:
    """This host's address as other hosts of the Ray cluster see it; loopback if it is alone."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return LOOPBACK if len(alive) == 1 else ray.util.get_node_ip_address()
