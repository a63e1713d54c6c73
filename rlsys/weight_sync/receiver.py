"""The receiving side of a weight sync: lives in every process that holds an engine's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlsys.weight_sync.checksum import checksum
from rlsys.weight_sync.plan import TensorMeta, plan_buckets
from rlsys.weight_sync.transport import Transport


class WeightReceiver:
    """Receives what a WeightSender sends; `metadata`, `bucket_bytes` and `verify` as there."""

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
        self.checksums: list[int] = []
        """Per bucket of the last `receive`, empty without `verify`."""

    def connect(
        self, address: str, port: int, *, rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Join the group of `world_size` ranks as one of the ranks 1 and up."""
        assert 0 < rank < world_size, (rank, world_size)
        self._transport.connect(
            address, port, rank=rank, world_size=world_size, timeout_s=timeout_s
        )

    def receive(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The (name, tensor) pairs of each bucket, in the transport's memory.

        Every bucket has memory of its own: vLLM keeps tensors until it has all parts of a layer,
        which may be spread over buckets.

        Raises:
            WeightSyncError: the sender did not send in time, or is gone.
        """
        self.checksums = []
        for bucket in self._buckets:
            buffer = torch.empty(
                bucket.nbytes, dtype=torch.uint8, device=self._transport.buffer_device
            )
            self._transport.broadcast(buffer, what=f"waiting for {bucket}")
            if self._verify:
                self.checksums.append(checksum(buffer))
            yield bucket.views(buffer)
