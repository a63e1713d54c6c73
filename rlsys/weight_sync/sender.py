"""The sending side of a weight sync: lives in the process of the policy's rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from rlsys.weight_sync.checksum import checksum
from rlsys.weight_sync.plan import Bucket, TensorMeta, plan_buckets
from rlsys.weight_sync.transport import Transport


class WeightSender:
    """Streams tensors in buckets to all rollout engines; needs the memory of one bucket.

    Args:
        metadata: every tensor of `send`, in its order.
        bucket_bytes: as on the receiving side.
        verify: compute checksums.
    """

    def __init__(
        self,
        metadata: Sequence[TensorMeta],
        *,
        transport: Transport,
        bucket_bytes: int,
        verify: bool,
    ):
        self._buckets = plan_buckets(metadata, bucket_bytes)
        self._transport = transport
        self._verify = verify

    def connect(self, address: str, port: int, *, world_size: int, timeout_s: float) -> None:
        """Join the group of `world_size` ranks as its rank 0."""
        self._transport.connect(address, port, rank=0, world_size=world_size, timeout_s=timeout_s)

    @torch.no_grad()
    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[int]:
        """Send all tensors; returns a checksum per bucket, or [] without `verify`.

        Raises:
            ValueError: a tensor's name, type or shape is not what the metadata announced.
            WeightSyncError: a receiver did not take part in time, or is gone.
        """
        stream = iter(tensors)
        checksums = []
        size = max(bucket.nbytes for bucket in self._buckets)
        # Zeros: bytes between tensors are sent too, and should be the same in every run.
        memory = torch.zeros(size, dtype=torch.uint8, device=self._transport.buffer_device)
        for bucket in self._buckets:
            buffer = memory[: bucket.nbytes]
            _pack(bucket, buffer, stream)
            self._transport.broadcast(buffer, what=f"sending {bucket}")
            if self._verify:  # while the receivers load this bucket
                checksums.append(checksum(buffer))
        extra = next(stream, None)
        if extra is not None:
            raise ValueError(f"weight sync got tensor {extra[0]!r}, which was not announced")
        return checksums


def _pack(bucket: Bucket, buffer: torch.Tensor, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
    for meta, (_, target) in zip(bucket.tensors, bucket.views(buffer), strict=True):
        name, tensor = next(iter(stream), ("nothing", torch.empty(0)))
        found = TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != meta:
            raise ValueError(f"weight sync expected {_describe(meta)}, got {_describe(found)}")
        target.copy_(tensor)


def _describe(meta: TensorMeta) -> str:
    return f"{meta.name} {list(meta.shape)} {meta.dtype}"
