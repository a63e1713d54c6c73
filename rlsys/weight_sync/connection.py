"""What the sender and the receivers of a weight sync have to agree on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlsys.weight_sync.plan import Bucket, TensorMeta, TensorSlice, plan_buckets


@dataclass(frozen=True, slots=True)
class Connection:
    """What is sent and to how many, the same on every rank; plain values, since it travels to them.

    There is one group or several of the same size, and everything is sent to one after the other:
    NCCL does not take two ranks on one GPU into one group. The sender is rank 0 of all groups, each
    process that holds a receiving model one of the ranks from 1 on, of one group.

    At first one connection sends whole tensors to all processes. Where these then say that they
    hold less, each worker of an engine gets a connection, with its counterparts in other engines.
    """

    slices: tuple[TensorSlice, ...]
    """What is sent, in the order in which it is sent."""
    sender: int
    """The policy rank that sends it."""
    transport: str
    """Name of a registered transport, or auto: NCCL between GPUs, gloo on CPU."""
    address: str
    ports: tuple[int, ...]
    """With `address`: the TCPStore of each group, at which its ranks meet."""
    world_size: int
    """Ranks of each group, the sender included."""
    bucket_bytes: int
    """Most that is sent at once; a larger tensor is sent alone."""
    verify: bool
    """Both sides compute checksums."""
    in_place: bool
    """Rollout engines may copy straight into their parameters, where these can be mapped."""
    timeout_s: float
    """Deadline, in seconds, of each wait for another rank."""
    shard: str = ""
    """What tells it in errors from the connections of other workers, where there are any."""

    def name_of(self, group: int) -> str:
        """What tells a group from the others in an error; nothing where there are no others."""
        return f" in group {group} of {len(self.ports)}" if len(self.ports) > 1 else self.shard

    def buckets(self) -> list[Bucket]:
        """Which slices travel in which bucket; raises ValueError, see `plan_buckets`."""
        return plan_buckets([piece.meta for piece in self.slices], self.bucket_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes that are sent to each group."""
        return sum(piece.meta.nbytes for piece in self.slices)


def whole_tensors(metadata: Iterable[TensorMeta]) -> tuple[TensorSlice, ...]:
    """All of each."""
    return tuple(TensorSlice.whole(meta) for meta in metadata)


def place_of_engine(
    engine_rank: int, *, tensor_parallel_size: int, engines_per_gpu: int
) -> tuple[int, int]:
    """(rank of an engine's first worker, its group): engines of one GPU are in different groups."""
    before, group = divmod(engine_rank, engines_per_gpu)
    return 1 + before * tensor_parallel_size, group


def senders_of_shards(
    number: int, *, tensor_parallel_size: int, pipeline_parallel_size: int, world_size: int
) -> list[int]:
    """The policy rank that sends to each worker of an engine, which has `number` of them.

    One whose own slice of the model is, or holds, or lies in that of the worker: a layer is cut the
    same way on both sides. Those that have the same slice, as they are replicas, take turns. With
    pipeline stages it is a rank of the first one, which gets the rest from the others. All sizes
    are the policy's; megatron-core numbers tensor-parallel ranks first and stages last.
    """
    num_replicas = world_size // (tensor_parallel_size * pipeline_parallel_size)
    used = [0] * tensor_parallel_size
    senders = []
    for shard in range(number):
        tensor_rank = shard * tensor_parallel_size // number
        replica = used[tensor_rank] % num_replicas
        used[tensor_rank] += 1
        senders.append(tensor_rank + replica * tensor_parallel_size)
    return senders
