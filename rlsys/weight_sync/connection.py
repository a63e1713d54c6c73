"""What the sender and the receivers of a weight sync have to agree on."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.weight_sync.plan import Bucket, TensorMeta, plan_buckets


@dataclass(frozen=True, slots=True)
class Connection:
    """One weight sync group, the same on every rank; plain values, since it travels to them.

    The sender is rank 0, each process that holds a receiving model one of the ranks from 1 on.
    """

    metadata: tuple[TensorMeta, ...]
    """Every tensor that is sent, in the order in which it is sent."""
    transport: str
    """Name of a registered transport, or auto: NCCL between GPUs, gloo on CPU."""
    address: str
    port: int
    """With `address`: the TCPStore at which the ranks meet."""
    world_size: int
    """Ranks, the sender included."""
    bucket_bytes: int
    """Most that is sent at once; a larger tensor is sent alone."""
    verify: bool
    """Both sides compute checksums."""
    in_place: bool
    """Rollout engines may copy straight into their parameters, where these can be mapped."""
    timeout_s: float
    """Deadline, in seconds, of each wait for another rank."""

    def buckets(self) -> list[Bucket]:
        """Which tensors travel in which bucket; raises ValueError, see `plan_buckets`."""
        return plan_buckets(self.metadata, self.bucket_bytes)
