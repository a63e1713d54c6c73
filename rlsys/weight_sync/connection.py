"""What the sender and the receivers of a weight sync agree on before they connect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlsys.weight_sync.plan import Bucket, TensorMeta, TensorSlice, plan_buckets

Content = Literal["weights", "base", "adapter"]
"""weights: the policy's, with a LoRA adapter merged in; base: without it; adapter: the adapter's
tensors under PEFT's names."""


@dataclass(frozen=True, slots=True)
class Connection:
    """One policy rank that sends, and the processes that all receive the same slices from it.

    The sender is rank 0 of the connection, the receivers are ranks 1 and up. The driver makes the
    connection and hands the same values to all of them.
    """

    slices: tuple[TensorSlice, ...]
    """The slices, in the order in which they are sent."""
    sender: int
    """The policy rank that sends."""
    transport: str
    """Name of a registered transport, or "auto": NCCL between GPUs, gloo on CPU."""
    address: str
    port: int
    """With `address`: the TCPStore through which the ranks find each other."""
    world_size: int
    """Number of ranks, the sender included."""
    bucket_bytes: int
    """Largest bucket; a larger tensor gets a bucket of its own."""
    verify: bool
    """Whether both sides compute checksums."""
    in_place: bool
    """Whether rollout engines may copy straight into their parameters, where they can."""
    timeout_s: float
    """Deadline, in seconds, of each wait for another rank."""
    content: Content = "weights"
    """What the slices are of."""
    adapter_scaling: float | None = None
    """Factor of B A in a LoRA adapter; None if no engine gets one."""
    label: str = ""
    """Distinguishes this connection in errors: " for worker 1 of 2"."""

    @property
    def sends_shards(self) -> bool:
        """Whether the receivers get parts of tensors."""
        return not all(piece.is_whole for piece in self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes of one update."""
        return sum(piece.meta.nbytes for piece in self.slices)

    def buckets(self) -> list[Bucket]:
        """Which slices travel in which bucket; raises ValueError, see `plan_buckets`."""
        return plan_buckets([piece.meta for piece in self.slices], self.bucket_bytes)


class Endpoint(NamedTuple):
    """Where one process receives."""

    connection: Connection
    rank: int


def ranks_of_connections(ranks: Sequence[int], num_connections: int) -> list[list[int]]:
    """The engines of each connection while every worker gets whole tensors, of those with `ranks`.

    There is one connection for each of the engines that share a GPU, since NCCL does not allow two
    ranks on one GPU. Engine i receives from connection i modulo their number.
    """
    return [[rank for rank in ranks if rank % num_connections == i] for i in range(num_connections)]


def endpoints_of_tensors(
    connections: Sequence[Connection], ranks: Sequence[Sequence[int]], *, workers_per_engine: int
) -> list[list[Endpoint]]:
    """Endpoints [engine][worker] while every worker gets whole tensors; [] of absent engines.

    Args:
        ranks: the engines of each connection.
    """
    engines = {
        rank: [
            Endpoint(connection, 1 + place * workers_per_engine + worker)
            for worker in range(workers_per_engine)
        ]
        for connection, own in zip(connections, ranks, strict=True)
        for place, rank in enumerate(own)
    }
    return [engines.get(rank, []) for rank in range(1 + max(engines))]


def endpoints_of_shards(
    connections: Sequence[Connection], ranks: Sequence[int]
) -> list[list[Endpoint]]:
    """Endpoints [engine][worker] when each worker gets its shard: worker i from connection i.

    Args:
        ranks: the engines.
    """
    engines = {
        rank: [Endpoint(connection, 1 + place) for connection in connections]
        for place, rank in enumerate(ranks)
    }
    return [engines.get(rank, []) for rank in range(1 + max(engines))]


def whole_tensors(metadata: Iterable[TensorMeta]) -> tuple[TensorSlice, ...]:
    """One slice for each tensor: the whole tensor."""
    return tuple(TensorSlice.whole(meta) for meta in metadata)


def senders_of_shards(
    num_workers: int, *, tensor_parallel_size: int, pipeline_parallel_size: int, world_size: int
) -> list[int]:
    """The policy rank that sends to each worker of an engine with `num_workers` workers.

    It is a rank whose shard equals, contains or is contained in the worker's shard: both sides cut
    a layer the same way. Replicas take turns. With pipeline stages it is a rank of the first stage,
    which gets the other layers from the other stages. All sizes are the policy's; megatron-core
    numbers tensor-parallel ranks first and stages last.
    """
    num_replicas = world_size // (tensor_parallel_size * pipeline_parallel_size)
    used = [0] * tensor_parallel_size
    senders = []
    for worker in range(num_workers):
        tensor_rank = worker * tensor_parallel_size // num_workers
        replica = used[tensor_rank] % num_replicas
        used[tensor_rank] += 1
        senders.append(tensor_rank + replica * tensor_parallel_size)
    return senders
