"""What the sender and the receivers of a weight sync have to agree on."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.weight_sync.plan import Bucket, TensorMeta, plan_buckets


@dataclass(frozen=True, slots=True)
class Connection:
    """What is sent and to how many, the same on every rank; plain values, since it travels to them.

    There is one group or several of the same size, and everything is sent to one after the other:
    NCCL does not take two ranks on one GPU into one group. The sender is rank 0 of all groups, each
    process that holds a receiving model one of the ranks from 1 on, of one group.
    """

    metadata: tuple[TensorMeta, ...]
    """Every tensor that is sent, in the order in which it is sent."""
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

    def name_of(self, group: int) -> str:
        """What tells a group from the others in an error; nothing where there are no others."""
        return f" in group {group} of {len(self.ports)}" if len(self.ports) > 1 else ""

    def buckets(self) -> list[Bucket]:
        """Which tensors travel in which bucket; raises ValueError, see `plan_buckets`."""
        return plan_buckets(self.metadata, self.bucket_bytes)


def place_of_engine(
    engine_rank: int, *, tensor_parallel_size: int, engines_per_gpu: int
) -> tuple[int, int]:
    """(rank of an engine's first worker, its group): engines of one GPU are in different groups."""
    before, group = divmod(engine_rank, engines_per_gpu)
    return 1 + before * tensor_parallel_size, group
