"""The policy's weights in the buckets of a weight sync: planned once, then a few large operations.

`MegatronWeights.export` gathers one parameter after the other, with collectives among all ranks.
Here the buckets hold any slices of Hugging Face tensors, and one rank, the sender, fills them. It
copies the parts of a slice that it has straight into the bucket. Each other part has one owner, the
lowest rank with it. An owner packs its parts of a bucket into one parcel and sends it to the
sender, which copies them into place. Tensor, pipeline and expert parallelism need no difference.
Parameters that are computed when they are read, such as weights with a LoRA adapter merged in, are
computed for each update, one at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.model.families.base import WeightRow
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.copies import CopyPlan
from rlsys.weight_sync.plan import Bucket, TensorMeta, TensorSlice, plan_buckets, shard_bounds
from rlsys.weight_sync.transport import WeightSyncError


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of one slice that one policy rank contributes."""

    item: TensorSlice
    """The slice that is sent: a tensor of a bucket."""
    box: TensorSlice
    """The part itself."""
    owner: int
    """The rank."""
    held: TensorSlice
    """What the owner has of the Hugging Face tensor, around the part."""
    index: int
    """Which of `MegatronWeights.own_slices` that is."""

    def target(self, tensor: torch.Tensor) -> torch.Tensor:
        """View of the part in the tensor that is sent."""
        return self.box.within(tensor, self.item)

    @property
    def in_parcel(self) -> TensorMeta:
        """The part as its owner sends it, with the name of the item and its number in that."""
        name = f"{self.item.meta.name}#{self.index}"
        return TensorMeta(name, self.box.tensor.dtype, self.box.shape)


@dataclass(slots=True)
class _Copies:
    """Copies into one bucket or parcel."""

    places: list[tuple[int, int]]
    """The memory that they are planned for; see `_place`."""
    own: CopyPlan
    """From this rank's parameters."""
    parcels: CopyPlan
    """From the parcels that arrived."""


class BucketExport:
    """This rank's part in filling the buckets of one weight sync connection.

    Every rank of the policy creates one at the same time. For each update the sender then calls
    `fill` for every bucket in order, the other ranks `contribute`.

    Order, on a GPU: copies run in the current stream, in which the optimizer writes parameters. A
    parcel is sent after the work that this stream held at the call. The stream waits for it before
    the sender reads it and before its owner packs the next one.

    Args:
        weights: this rank's.
        connection: says what is sent, in which buckets and by which rank.
    """

    def __init__(self, weights: MegatronWeights, connection: Connection):
        self._weights = weights
        self._rank = dist.get_rank()
        self._sender = connection.sender
        self._rows = {hf_name: row for row in weights.table for hf_name in row.hf_names}
        self._buckets = connection.buckets()
        items = {piece.meta.name: piece for piece in connection.slices}
        owners = self._find_owners()
        self._parts = [
            [part for meta in bucket.tensors for part in self._cut(items[meta.name], owners)]
            for bucket in self._buckets
        ]
        self._parameters = [
            [self._parameter(part) for part in self._own(parts) if not self._is_computed(part)]
            for parts in self._parts
        ]
        self._parcels = [self._plan_parcels(parts) for parts in self._parts]
        self._staging = self._make_staging()
        self._copies: dict[int, _Copies] = {}

    def fill(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Write the current weights into `buffer` [nbytes] uint8: the sender's part.

        Raises:
            WeightSyncError: another rank did not send its parcel.
        """
        assert self._rank == self._sender, (self._rank, self._sender)
        parcels = self._parcels[bucket.index]
        ops = [
            dist.P2POp(dist.irecv, self._parcel_memory(bucket, owner), owner) for owner in parcels
        ]
        copies = self._plan(bucket, buffer)
        copies.own.run()
        self._copy_computed(bucket, buffer)
        self._exchange(ops, bucket)
        copies.parcels.run()

    def contribute(self) -> None:
        """Send this rank's parcels to the sender: the other ranks' part.

        Raises:
            WeightSyncError: the sender did not receive one.
        """
        assert self._rank != self._sender
        for bucket, parcels in zip(self._buckets, self._parcels, strict=True):
            if self._rank in parcels:
                memory = self._parcel_memory(bucket, self._rank)
                self._plan(bucket, memory).own.run()
                self._copy_computed(bucket, memory)
                self._exchange([dist.P2POp(dist.isend, memory, self._sender)], bucket)

    def _find_owners(self) -> dict[tuple[str, int], int]:
        """(first Hugging Face name of a row, index of its slice) -> rank that contributes it.

        The sender if it has the slice, else the lowest rank with it.
        """
        held = []
        for row in self._weights.table:
            if self._weights.own_parameter(row) is not None:
                index, _ = self._weights.slice_of(row)
                held.append((row.hf_names[0], index))
        by_rank: list[list[tuple[str, int]]] = [held] * dist.get_world_size()
        dist.all_gather_object(by_rank, held)
        owners = dict.fromkeys(by_rank[self._sender], self._sender)
        for rank, names in enumerate(by_rank):
            for name in names:
                owners.setdefault(name, rank)
        return owners

    def _cut(self, item: TensorSlice, owners: Mapping[tuple[str, int], int]) -> Iterator[_Part]:
        """Cut a slice that is sent into the parts that policy ranks have."""
        row = self._rows[item.tensor.name]
        _, num_shards = self._weights.slice_of(row)
        for index, part in enumerate(row.parts):
            if part.hf_name != item.tensor.name:
                continue
            for shard in range(num_shards):
                starts, shape = [part.start, *[0] * len(part.shape[1:])], list(part.shape)
                if (axis := row.tp_axis) is not None:
                    start, stop = shard_bounds(part.shape[axis], shard, num_shards)
                    starts[axis] += start
                    shape[axis] = stop - start
                held = TensorSlice(item.tensor, tuple(starts), tuple(shape))
                box = item.intersection(held)
                if box is not None:
                    yield _Part(item, box, owners[row.hf_names[0], shard], held, index)

    def _parameter(self, part: _Part) -> torch.Tensor:
        parameter = self._weights.own_parameter(self._row(part))
        assert parameter is not None, part
        return parameter

    def _plan_parcels(self, parts: Sequence[_Part]) -> dict[int, Bucket]:
        """The layout of each other owner's parcel of a bucket."""
        by_owner: dict[int, list[TensorMeta]] = {}
        for part in parts:
            if part.owner != self._sender:
                by_owner.setdefault(part.owner, []).append(part.in_parcel)
        return {owner: plan_buckets(metas, sys.maxsize)[0] for owner, metas in by_owner.items()}

    def _make_staging(self) -> dict[int, torch.Tensor]:
        """Memory for a parcel of each owner; on ranks that do not send only for their own."""
        sizes: dict[int, int] = {}
        for parcels in self._parcels:
            for owner, parcel in parcels.items():
                if self._rank in (self._sender, owner):
                    sizes[owner] = max(sizes.get(owner, 0), parcel.nbytes)
        return {
            owner: torch.zeros(size, dtype=torch.uint8, device=self._weights.device)
            for owner, size in sizes.items()
        }

    def _parcel_memory(self, bucket: Bucket, owner: int) -> torch.Tensor:
        return self._staging[owner][: self._parcels[bucket.index][owner].nbytes]

    def _plan(self, bucket: Bucket, buffer: torch.Tensor) -> _Copies:
        """This rank's copies into `buffer`, a bucket or a parcel; planned again if that moved."""
        places = [_place(tensor) for tensor in (buffer, *self._parameters[bucket.index])]
        planned = self._copies.get(bucket.index)
        if planned is None or planned.places != places:
            planned = self._make_plan(bucket, buffer, places)
            self._copies[bucket.index] = planned
        return planned

    def _own(self, parts: Sequence[_Part]) -> list[_Part]:
        return [part for part in parts if part.owner == self._rank]

    @torch.no_grad()
    def _copy_computed(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        by_row: dict[tuple[str, ...], list[tuple[_Part, torch.Tensor]]] = {}
        for part, target in self._own_targets(bucket, buffer):
            if self._is_computed(part):
                by_row.setdefault(self._row(part).names, []).append((part, target))
        for parts in by_row.values():
            slices = self._weights.own_slices(self._row(parts[0][0]))
            for part, whole_target in parts:
                for target, source in self._pairs(part, whole_target, slices):
                    target.copy_(source)

    def _make_plan(
        self, bucket: Bucket, buffer: torch.Tensor, places: list[tuple[int, int]]
    ) -> _Copies:
        parcels = self._parcels[bucket.index]
        own = CopyPlan(
            pair
            for part, target in self._own_targets(bucket, buffer)
            if not self._is_computed(part)
            for pair in self._pairs(part, target, self._weights.own_slices(self._row(part)))
        )
        if self._rank != self._sender:
            return _Copies(places, own, CopyPlan([]))
        tensors = dict(bucket.views(buffer))
        arriving = []
        for owner, parcel in parcels.items():
            parts = [part for part in self._parts[bucket.index] if part.owner == owner]
            views = parcel.views(self._parcel_memory(bucket, owner))
            for part, (_, view) in zip(parts, views, strict=True):
                arriving.append((part.target(tensors[part.item.meta.name]), view))
        return _Copies(places, own, CopyPlan(arriving))

    def _own_targets(
        self, bucket: Bucket, buffer: torch.Tensor
    ) -> Iterator[tuple[_Part, torch.Tensor]]:
        """This rank's parts of a bucket, and where they go in it, or in the rank's parcel."""
        own = self._own(self._parts[bucket.index])
        if self._rank != self._sender:
            views = self._parcels[bucket.index][self._rank].views(buffer)
            yield from zip(own, (view for _, view in views), strict=True)
            return
        tensors = dict(bucket.views(buffer))
        for part in own:
            yield part, part.target(tensors[part.item.meta.name])

    def _pairs(
        self, part: _Part, target: torch.Tensor, slices: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of a part, from `MegatronWeights.own_slices` of its row."""
        source = slices[part.index]
        if self._row(part).query_groups:
            yield from _from_query_groups(target, source, part)
        else:
            yield target, part.box.within(source, part.held)

    def _row(self, part: _Part) -> WeightRow:
        return self._rows[part.item.tensor.name]

    def _is_computed(self, part: _Part) -> bool:
        return self._weights.computes(self._row(part))

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


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Storage and offset of a tensor.

    The storage keeps its identity, and all views of it, where its memory waits on the host for a
    while (`rlsys.engines.megatron.offload`). A plan keeps it alive, so no other one is mistaken
    for it.
    """
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _from_query_groups(
    target: torch.Tensor, source: torch.Tensor, part: _Part
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of rows that a parameter has by query group: `source` [groups, rows, ...]."""
    for axis, size in enumerate(part.box.shape[1:], start=1):
        start = part.box.starts[axis] - part.held.starts[axis]
        source = source.narrow(axis + 1, start, size)
    rows = source.shape[1]
    start = part.box.starts[0] - part.held.starts[0]
    stop = start + part.box.shape[0]
    if start % rows == stop % rows == 0:
        yield target.unflatten(0, (-1, rows)), source[start // rows : stop // rows]
        return
    for group in range(start // rows, -(-stop // rows)):
        first, last = max(start, group * rows), min(stop, (group + 1) * rows)
        yield (
            target[first - start : last - start],
            source[group, first - group * rows : last - group * rows],
        )
