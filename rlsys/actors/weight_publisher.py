"""The driver's side of weight sync: who does what when, with a deadline on every wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.distributed import TCPStore

from rlsys.actors.group import START_TIMEOUT_S
from rlsys.actors.meeting import meeting_address
from rlsys.actors.rollback import with_finite_weights
from rlsys.actors.turns import Turns
from rlsys.actors.waiting import all_ready, get_all, get_one
from rlsys.config import WeightSyncConfig
from rlsys.problems import RunFailed
from rlsys.weight_sync.connection import (
    Connection,
    Content,
    Endpoint,
    endpoints_of_shards,
    endpoints_of_tensors,
    ranks_of_connections,
    senders_of_shards,
    whole_tensors,
)
from rlsys.weight_sync.plan import TensorSlice
from rlsys.weight_sync.transport import WeightSyncError, serve_store

if TYPE_CHECKING:
    from rlsys.actors.group import ActorGroup, Refs
    from rlsys.actors.policy import PolicyActors
    from rlsys.actors.reference import ReferenceActors
    from rlsys.actors.rollout import RolloutActors

# A rank that waits for another gives up after timeout_s and names itself and the phase. The driver
# waits a little longer, so that its less specific error comes second. Once buckets travel over NCCL
# the host does not wait: torch ends a process whose transfer took too long.
GRACE_S = 5.0


class _Transfer(NamedTuple):
    """One update of what the connections bring."""

    nbytes: int
    """Bytes that each engine asked for."""
    seconds: float
    sent_bytes: int
    """Bytes that the slowest sender sent, and how long it took."""
    transport_seconds: float


class WeightPublisher:
    """Sends the policy's weights to every rollout engine, or to the reference.

    Args:
        policy: sends.
        receivers: their actors have `connect_weight_sync(endpoints)`, `needed_slices()`,
            `start_weight_update()` and `update_weights(version)`. The last one begins after the
            pause that was requested before it, and returns the version that the actor now holds.
        config: buckets, checksums, transport and deadlines.
        to: name that distinguishes several receivers of one policy.
        transport: name of the registered transport; None takes the config's.
        turns: of policy and receivers, which may share GPUs.
        adapter_scaling: factor of B A, if engines sample with the policy's LoRA adapter. Then the
            first publish also sends the base, and all others the adapter alone.

    Raises:
        ActorFailure, PhaseTimeout: a rank failed or did not answer in time.
    """

    def __init__(
        self,
        policy: PolicyActors,
        receivers: RolloutActors | ReferenceActors,
        config: WeightSyncConfig,
        *,
        to: str = "rollout",
        transport: str | None = None,
        turns: Turns | None = None,
        adapter_scaling: float | None = None,
    ):
        self._policy = policy
        self._receivers = receivers
        self._config = config
        self._to = to
        self._transport = transport or config.transport
        self._turns = turns or Turns()
        self._turns.sync = self.publish
        self._adapter_scaling = adapter_scaling
        self._stores: list[TCPStore] = []
        self._calls: list[Refs] = []
        """Of the publish that is under way."""
        self._failed_calls: list[Refs] = []
        self._answers: dict[str, Callable[[str], None] | None] = {}
        """What the timeline wants to hear of each actor that answers its newest call."""
        policy.publishers.append(self)
        self.published = 0
        """The version that the receivers got last."""
        self.connect()

    def connect(self) -> None:
        """Connect the policy to all receivers, which first get whole tensors."""
        self._connect("weights" if self._adapter_scaling is None else "base")

    def _connect(self, content: Content) -> None:
        self._content, self._is_connected = content, True
        policy = self._policy
        adapter = content == "adapter"
        metadata = policy.adapter_metadata() if adapter else policy.weight_metadata()
        self._tensors = whole_tensors(metadata)
        self._bytes = sum(piece.meta.nbytes for piece in self._tensors)
        receivers = self._receivers
        ranks = ranks_of_connections(receivers.ranks, len(receivers.senders))
        several = len(ranks) > 1
        connections = [
            self._make_connection(
                self._tensors,
                sender=sender,
                num_receivers=len(own) * receivers.workers_per_engine,
                label=f" in connection {index} of {len(ranks)}" if several else "",
            )
            for index, (sender, own) in enumerate(zip(receivers.senders, ranks, strict=True))
        ]
        endpoints = endpoints_of_tensors(
            connections, ranks, workers_per_engine=receivers.workers_per_engine
        )
        self._join(connections, endpoints)
        self._knows_shards = False

    def publish(self) -> dict[str, float]:
        """Send the weights of `policy.policy_version`; returns when every engine samples with them.

        The numbers in comments are rows of the table in docs/internals.md.

        Returns:
            The `weight_sync/...` metrics, and those of turns on shared GPUs.

        Raises:
            WeightSyncError: an engine reports another version.
            ActorFailure, PhaseTimeout: a rank failed or did not answer in time. An engine that
                received other bytes than were sent fails.
        """
        receivers = partial(self._receivers.healed, "weight sync", self._publish)
        send = partial(self._policy.healed, "send_weights", receivers)
        return with_finite_weights(self._policy, send)

    def forget_connection(self) -> None:
        """Connect again before the next publish, since ranks have been restarted."""
        self._is_connected = False
        self._stores.clear()  # whoever waits there for a rank that is lost gives up now

    def _publish(self) -> dict[str, float]:
        version = self._policy.policy_version
        try:
            with self._turns.for_weight_sync():
                came_or_left = self._receivers.take_in(timeout_s=START_TIMEOUT_S)
                if came_or_left:
                    self.connect()
                elif not self._is_connected:
                    self._connect(self._content)  # receivers that are the same keep their base
                transfers = [self._transfer()]
                if self._content == "base":  # once: it does not change
                    self._connect("adapter")
                    transfers.append(self._transfer())
        except RunFailed:
            self.forget_connection()
            self._failed_calls += self._calls
            raise
        finally:
            self._calls = []
        self._forget_failed_calls()
        self.published = version
        nbytes, seconds, sent_bytes, transport_seconds = map(sum, zip(*transfers, strict=True))
        return {
            "weight_sync/bytes": float(nbytes),
            "weight_sync/seconds": seconds,
            "weight_sync/mb_per_s": nbytes / 1e6 / seconds,
            "weight_sync/transport_seconds": transport_seconds,
            "weight_sync/transport_gb_per_s": sent_bytes / 1e9 / transport_seconds,
            **self._turns.metrics(),
        }

    def _begin(self, group: ActorGroup, method: str, *args: Any, **kwargs: Any) -> Refs:
        refs = group.async_call(method, *args, **kwargs)
        self._calls.append(refs)
        self._answers |= dict.fromkeys(refs, group.answers(method))
        return refs

    def _forget_failed_calls(self) -> None:
        """Take the errors of earlier attempts, which Ray would print otherwise."""
        calls, self._failed_calls = self._failed_calls, []
        for refs in calls:
            for ref in all_ready(list(refs.values())):
                with suppress(RunFailed):
                    get_one(ref, name="", phase="")

    def _transfer(self) -> _Transfer:
        start = time.monotonic()
        version = self._policy.policy_version
        # All calls are made at once: the policy packs the first bucket while engines still pause.
        pausing = self._begin(self._receivers, "start_weight_update")  # 1
        sending = self._begin(self._policy, "send_weights", version, to=self._to)  # 2 and 3
        receiving = self._begin(self._receivers, "update_weights", version)  # 2, 3 and 4
        # No grace: if an engine cannot pause, the ranks that wait for it give up at the same time.
        self._wait(pausing, "pausing rollouts", grace_s=0.0)
        results = self._wait(sending | receiving, "transfer")
        sent_seconds, held_versions = results[: len(sending)], results[len(sending) :]
        for engine, held in zip(receiving, held_versions, strict=True):  # 5
            if held != version:
                raise WeightSyncError(
                    f"{engine} holds weight version {held} after version {version} was published"
                )
        seconds = time.monotonic() - start
        transport_seconds, sent_bytes = max(zip(sent_seconds, self._sent_bytes, strict=True))
        # Engines know what they need once they have loaded weights.
        if self._content == "weights" and not self._knows_shards:
            self._connect_shards()
        return _Transfer(self._bytes, seconds, sent_bytes, transport_seconds)

    def _connect_shards(self) -> None:
        """From the next update on, send each worker of an engine only what it holds.

        Nothing changes if engines have one worker, or if vLLM's loader needs whole tensors.
        """
        self._knows_shards = True
        needed = self._wait(self._begin(self._receivers, "needed_slices"), "planning")
        if None in needed[0] or any(engine != needed[0] for engine in needed):
            return
        num_workers = len(needed[0])
        if num_workers == 1:
            return
        sizes = self._policy.config.policy
        senders = senders_of_shards(
            num_workers,
            tensor_parallel_size=sizes.tensor_parallel_size,
            pipeline_parallel_size=sizes.pipeline_parallel_size,
            world_size=sizes.world_size,
        )
        connections = [
            self._make_connection(
                slices,
                sender=sender,
                num_receivers=len(needed),
                label=f" for worker {worker} of {num_workers}",
            )
            for worker, (slices, sender) in enumerate(zip(needed[0], senders, strict=True))
        ]
        self._join(connections, endpoints_of_shards(connections, self._receivers.ranks))

    def _make_connection(
        self, slices: Sequence[TensorSlice], *, sender: int, num_receivers: int, label: str
    ) -> Connection:
        config, address = self._config, meeting_address()
        store = serve_store(address, config.timeout_s, self._policy.config.store_ports)
        self._stores.append(store)  # lives as long as the connection: every update uses it
        return Connection(
            slices=tuple(slices),
            sender=sender,
            transport=self._transport,
            address=address,
            port=store.port,
            world_size=1 + num_receivers,
            bucket_bytes=config.bucket_mb * 2**20,
            verify=config.verify,
            in_place=config.in_place,
            timeout_s=config.timeout_s,
            content=self._content,
            adapter_scaling=self._adapter_scaling,
            label=label,
        )

    def _join(
        self, connections: Sequence[Connection], endpoints: Sequence[Sequence[Endpoint]]
    ) -> None:
        """Connect both sides, which leave their earlier connections."""
        receiving = self._begin(self._receivers, "connect_weight_sync", endpoints)
        sending = self._begin(self._policy, "connect_weight_sync", connections, to=self._to)
        self._wait(sending | receiving, "connecting")
        self._stores = self._stores[-len(connections) :]
        self._sent_bytes = [
            sum(connection.nbytes for connection in connections if connection.sender == rank)
            for rank in range(len(sending))
        ]

    def _wait(self, refs: Refs, phase: str, *, grace_s: float = GRACE_S) -> list[Any]:
        timeout_s = self._config.timeout_s + grace_s

        def on_done(name: str) -> None:
            if (answer := self._answers[name]) is not None:
                answer(name)

        return get_all(refs, phase=f"weight sync, {phase}", timeout_s=timeout_s, on_done=on_done)
