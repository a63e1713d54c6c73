"""The sending side of a weight sync: lives in the process of the policy's rank 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import Bucket, TensorMeta
from rlsys.weight_sync.transport import join


class WeightSender:
    """Streams tensors in buckets to all rollout engines; needs the memory of two buckets.

    Joins the group when created, as its rank 0.

    Args:
        device: where the tensors of `send` are.

    Raises:
        WeightSyncError: not all ranks came in time.
    """

    def __init__(self, connection: Connection, device: torch.device):
        self._buckets = connection.buckets()
        self._verify = connection.verify
        self._transport = join(connection, 0, device)

    @torch.no_grad()
    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[int]:
        """Send all tensors; returns a checksum per bucket, or [] without `verify`.

        Raises:
            ValueError: a tensor's name, type or shape is not what the metadata announced.
            WeightSyncError: a receiver did not take part in time, or is gone.
        """
        stream = iter(tensors)
        checksums = []
        # One buffer is packed while the other is sent. Zeros: bytes between tensors are sent too,
        # and should be the same in every run.
        size = max(bucket.nbytes for bucket in self._buckets)
        memory = torch.zeros(
            min(2, len(self._buckets)),
            size,
            dtype=torch.uint8,
            device=self._transport.buffer_device,
        )
        sending: dict[int, Callable[[], None]] = {}
        for bucket in self._buckets:
            turn = bucket.index % 2
            buffer = memory[turn, : bucket.nbytes]
            if turn in sending:
                sending.pop(turn)()
            _pack(bucket, buffer, stream)
            sending[turn] = self._transport.broadcast(buffer, what=f"sending {bucket}")
            if self._verify:
                checksums.append(checksum(buffer))
        for wait in sending.values():
            wait()
        extra = next(stream, None)
        if extra is not None:
            raise ValueError(f"weight sync got tensor {extra[0]!r}, which was not announced")
        return as_numbers(checksums)


def _pack(bucket: Bucket, buffer: torch.Tensor, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    sources, targets = [], []
    for meta, (_, target) in zip(bucket.tensors, bucket.views(buffer), strict=True):
        name, tensor = next(stream, ("nothing", torch.empty(0)))
        found = TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != meta:
            raise ValueError(f"weight sync expected {_describe(meta)}, got {_describe(found)}")
        sources.append(tensor)
        targets.append(target)
    torch._foreach_copy_(targets, sources)  # one kernel for many tensors


def _describe(meta: TensorMeta) -> str:
    return f"{meta.name} {list(meta.shape)} {meta.dtype}"
