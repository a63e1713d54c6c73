"""The policy's weights in the buckets of a weight sync: planned once, then a few large operations.

`MegatronWeights.export` gathers one parameter after the other, with collectives among all ranks.
Here every slice of a Hugging Face tensor has one owner, the lowest rank that holds it. What rank 0
owns is copied straight into the bucket; every other owner packs what it has of a bucket into one
parcel and sends that to rank 0, which copies it to where it belongs. So it is for tensor, pipeline
and expert parallelism alike, and replicas have nothing to do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlsys.engines.megatron_weights import MegatronWeights
from rlsys.weight_sync.copies import CopyPlan
from rlsys.weight_sync.plan import Bucket, TensorMeta, plan_buckets
from rlsys.weight_sync.transport import WeightSyncError

SENDER = 0
"""The policy rank that sends the buckets."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """What one policy rank has of one Hugging Face tensor."""

    hf_name: str
    owner: int
    axis: int | None
    """That tensor parallelism cuts; None: the slice is the whole tensor."""
    index: int
    """Of the slice along that axis."""
    meta: TensorMeta
    """Of the slice by itself; its name holds the index."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of the whole tensor."""
        if self.axis is None:
            return tensor
        length = self.meta.shape[self.axis]
        return tensor.narrow(self.axis, self.index * length, length)


@dataclass(slots=True)
class _Copies:
    """Planned for memory that has these addresses."""

    addresses: list[int]
    own: CopyPlan
    """From this rank's parameters."""
    parcels: CopyPlan
    """From the parcels that arrived."""


class BucketExport:
    """This rank's part in filling the buckets of one weight sync connection.

    Every rank of the policy makes one at the same time. For each update rank 0 then calls `fill`
    for every bucket in order, all others `contribute`.

    Order, on a GPU: copies run in the current stream, in which the optimizer writes parameters. A
    parcel is sent after what that stream held when it was asked for, and the stream waits for it
    before it is read, on rank 0, or packed anew, on its owner.

    Args:
        weights: of this rank.
        buckets: of whole Hugging Face tensors, in the order of `weights.metadata()`.
    """

    def __init__(self, weights: MegatronWeights, buckets: Sequence[Bucket]):
        self._weights = weights
        self._rank = dist.get_rank()
        self._parts = {
            hf_name: (row, part)
            for row in weights.table
            for part, hf_name in enumerate(row.hf_names)
        }
        self._buckets = list(buckets)
        owners = self._find_owners()
        self._slices = [
            [piece for meta in bucket.tensors for piece in self._cut(meta, owners)]
            for bucket in buckets
        ]
        self._parameters = [
            [self._parameter(piece) for piece in self._own(slices)] for slices in self._slices
        ]
        self._parcels = [_parcels(slices) for slices in self._slices]
        self._staging = self._make_staging()
        self._copies: dict[int, _Copies] = {}

    def fill(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Write the weights as they are now into `buffer` [nbytes] uint8: rank 0's part.

        Raises:
            WeightSyncError: another rank did not send its parcel.
        """
        assert self._rank == SENDER, self._rank
        parcels = self._parcels[bucket.index]
        ops = [
            dist.P2POp(dist.irecv, self._parcel_memory(bucket, owner), owner) for owner in parcels
        ]
        copies = self._plan(bucket, buffer)
        copies.own.run()
        self._exchange(ops, bucket)
        copies.parcels.run()

    def contribute(self) -> None:
        """Send rank 0 what it needs of this rank: every other rank's part.

        Raises:
            WeightSyncError: rank 0 did not receive it.
        """
        assert self._rank != SENDER
        for bucket, parcels in zip(self._buckets, self._parcels, strict=True):
            if self._rank in parcels:
                memory = self._parcel_memory(bucket, self._rank)
                self._plan(bucket, memory).own.run()
                self._exchange([dist.P2POp(dist.isend, memory, SENDER)], bucket)

    def _find_owners(self) -> dict[tuple[str, int], int]:
        """(first Hugging Face name of a row, index of the slice) -> the lowest rank that has it."""
        held = []
        for row in self._weights.table:
            if self._weights.own_parameter(row) is not None:
                index, _ = self._weights.slice_of(row)
                held.append((row.hf_names[0], index))
        by_rank: list[list[tuple[str, int]]] = [held] * dist.get_world_size()
        dist.all_gather_object(by_rank, held)
        owners: dict[tuple[str, int], int] = {}
        for rank, names in enumerate(by_rank):
            for name in names:
                owners.setdefault(name, rank)
        return owners

    def _cut(self, meta: TensorMeta, owners: Mapping[tuple[str, int], int]) -> list[_Slice]:
        row, _ = self._parts[meta.name]
        _, number = self._weights.slice_of(row)
        axis = row.tp_axis if number > 1 else None
        shape = list(meta.shape)
        if axis is not None:
            shape[axis] //= number
        return [
            _Slice(
                hf_name=meta.name,
                owner=owners[row.hf_names[0], index],
                axis=axis,
                index=index,
                meta=TensorMeta(f"{meta.name}, slice {index}", meta.dtype, tuple(shape)),
            )
            for index in range(number)
        ]

    def _parameter(self, piece: _Slice) -> torch.nn.Parameter:
        parameter = self._weights.own_parameter(self._parts[piece.hf_name][0])
        assert parameter is not None, piece
        return parameter

    def _make_staging(self) -> dict[int, torch.Tensor]:
        """Memory for a parcel of each owner: on rank 0 that of all, elsewhere one's own."""
        sizes: dict[int, int] = {}
        for parcels in self._parcels:
            for owner, parcel in parcels.items():
                if self._rank in (SENDER, owner):
                    sizes[owner] = max(sizes.get(owner, 0), parcel.nbytes)
        return {
            owner: torch.zeros(size, dtype=torch.uint8, device=self._weights.device)
            for owner, size in sizes.items()
        }

    def _parcel_memory(self, bucket: Bucket, owner: int) -> torch.Tensor:
        return self._staging[owner][: self._parcels[bucket.index][owner].nbytes]

    def _plan(self, bucket: Bucket, buffer: torch.Tensor) -> _Copies:
        """This rank's copies into `buffer`, a bucket or a parcel; new ones if memory has moved."""
        parameters = self._parameters[bucket.index]
        addresses = [buffer.data_ptr(), *[parameter.data_ptr() for parameter in parameters]]
        planned = self._copies.get(bucket.index)
        if planned is None or planned.addresses != addresses:
            planned = self._plan_anew(bucket, buffer, addresses)
            self._copies[bucket.index] = planned
        return planned

    def _own(self, slices: Sequence[_Slice]) -> list[_Slice]:
        return [piece for piece in slices if piece.owner == self._rank]

    def _plan_anew(self, bucket: Bucket, buffer: torch.Tensor, addresses: list[int]) -> _Copies:
        own = self._own(self._slices[bucket.index])
        parcels = self._parcels[bucket.index]
        if self._rank != SENDER:
            targets = [view for _, view in parcels[self._rank].views(buffer)]
            return _Copies(addresses, self._from_parameters(own, targets), CopyPlan([]))
        tensors = dict(bucket.views(buffer))
        slices = {piece.meta.name: piece for piece in self._slices[bucket.index]}
        arriving = [
            (slices[name].of(tensors[slices[name].hf_name]), view)
            for owner, parcel in parcels.items()
            for name, view in parcel.views(self._parcel_memory(bucket, owner))
        ]
        targets = [piece.of(tensors[piece.hf_name]) for piece in own]
        return _Copies(addresses, self._from_parameters(own, targets), CopyPlan(arriving))

    def _from_parameters(self, own: Sequence[_Slice], targets: Sequence[torch.Tensor]) -> CopyPlan:
        pairs = []
        for piece, target in zip(own, targets, strict=True):
            row, part = self._parts[piece.hf_name]
            source = self._weights.own_slices(row)[part]
            pairs.append((target.view(source.shape), source))  # q, k and v lie by query group
        return CopyPlan(pairs)

    def _exchange(self, ops: list[dist.P2POp], bucket: Bucket) -> None:
        if not ops:
            return
        try:
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        except RuntimeError as error:  # torch raises nothing more specific
            others = ", ".join(str(op.peer) for op in ops)
            raise WeightSyncError(
                f"policy rank {self._rank}, gathering {bucket} with rank {others}: {error}"
            ) from error


def _parcels(slices: Sequence[_Slice]) -> dict[int, Bucket]:
    """How each owner but rank 0 lays its slices of a bucket out, to send them at once."""
    by_owner: dict[int, list[TensorMeta]] = {}
    for piece in slices:
        if piece.owner != SENDER:
            by_owner.setdefault(piece.owner, []).append(piece.meta)
    return {owner: plan_buckets(metas, sys.maxsize)[0] for owner, metas in by_owner.items()}
