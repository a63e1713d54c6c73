"""New weights straight into vLLM's own parameters: a plan made once, then a few large copies.

vLLM's loader decides where a Hugging Face tensor goes: which rows of a fused parameter, which
shard of a tensor-parallel rank. Running its Python for every tensor takes ten times as long as
moving the bytes. So it is run once, on tensors without memory, and watched: every copy that it asks
for becomes an entry of the plan. No table of models has to be kept, whatever vLLM can load is
covered; and what it does other than copy, the plan refuses by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.copies import CopyPlan
from rlsys.weight_sync.plan import DTYPES, Bucket, TensorMeta, TensorSlice

COPY, FILL = torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar


class CannotMap(ValueError):
    """These weights cannot be copied in place; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One slice of a Hugging Face tensor and the slice of vLLM's parameter it lands in."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of the slice within the contiguous Hugging Face tensor, in elements."""
    target: torch.Tensor
    """Shares the memory of the parameter."""

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of a tensor that has arrived."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def box_of(self, meta: TensorMeta) -> TensorSlice | None:
        """The slice as a box of the Hugging Face tensor, if it is one."""
        strides = _contiguous_strides(meta.shape)
        if self.stride != strides:
            return None
        starts, rest = [], self.offset
        for stride in strides:
            start, rest = divmod(rest, stride)
            starts.append(start)
        ends = (start + size for start, size in zip(starts, self.size, strict=True))
        if any(end > size for end, size in zip(ends, meta.shape, strict=True)):
            return None  # from the end of a row on into the next
        return TensorSlice(meta, tuple(starts), self.size)


class HeldSlice(NamedTuple):
    """A slice of a Hugging Face tensor that a worker's parameters hold: for comparisons."""

    tensor: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    checksum: int


class InPlacePlan:
    """Where every tensor of a weight sync lands in one worker's model.

    Args:
        model: vLLM's model, loaded.
        metadata: every tensor that the policy exports, whole; `expect` has less of it sent.

    Raises:
        CannotMap: vLLM transforms a tensor while loading it, or keeps a parameter that no tensor
            fills.
    """

    def __init__(self, model: torch.nn.Module, metadata: Sequence[TensorMeta]):
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if parameter.numel() == 0 or parameter.is_meta:
                raise CannotMap(f"{name} has no memory of its own")
        recorder = _LoadRecorder(parameters)
        announced = [
            (meta.name, torch.empty(meta.shape, dtype=DTYPES[meta.dtype], device="meta"))
            for meta in metadata
        ]
        recorder.watch(announced)
        with torch.no_grad(), recorder:
            model.load_weights(announced)  # type: ignore[operator]
        recorder.check_complete()
        self.copies: Mapping[str, list[Copy]] = recorder.copies
        self._metadata = list(metadata)
        self._arriving = self.copies
        """By the name of what is sent: the copies that are made of it."""
        self._parameters = list(parameters.values())
        self._addresses = self._addresses_now()
        self._loads: dict[int, tuple[int, CopyPlan]] = {}
        """By bucket: the address of the buffer it came in, and its copies from there."""

    @property
    def is_stale(self) -> bool:
        """Whether parameters lie elsewhere now: then the plan would write where nobody reads."""
        return self._addresses_now() != self._addresses

    def load(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Copy what has arrived in `buffer` [nbytes] uint8 to where it belongs.

        On a GPU in the current stream. Fast where a bucket comes in the same buffer again.
        """
        address, copies = self._loads.get(bucket.index, (0, None))
        if copies is None or address != buffer.data_ptr():
            copies = CopyPlan(
                (copy.target, copy.source(tensor))
                for name, tensor in bucket.views(buffer)
                for copy in self._arriving[name]
            )
            self._loads[bucket.index] = buffer.data_ptr(), copies
        copies.run()

    def needed(self) -> tuple[TensorSlice, ...]:
        """What of the tensors has to be sent to this worker, in their order."""
        return tuple(self._by_slice())

    def expect(self, slices: Sequence[TensorSlice]) -> None:
        """From now on `load` gets what is `needed`, and not whole tensors."""
        by_slice = self._by_slice()
        assert list(by_slice) == list(slices), "other slices than this worker asked for"
        self._arriving = {piece.meta.name: copies for piece, copies in by_slice.items()}
        self._loads.clear()

    def _by_slice(self) -> dict[TensorSlice, list[Copy]]:
        """Each slice that some copies read, with these copies as they read it by itself."""
        by_slice: dict[TensorSlice, list[Copy]] = {}
        for meta in self._metadata:
            for copy in self.copies[meta.name]:
                box = copy.box_of(meta)
                if box is None:
                    box = TensorSlice.whole(meta)
                else:
                    strides = _contiguous_strides(copy.size)
                    copy = replace(copy, stride=strides, offset=0)
                by_slice.setdefault(box, []).append(copy)
        return by_slice

    def held(self) -> list[HeldSlice]:
        """What the parameters hold now, of every copy."""
        all_copies = [(name, copy) for name, copies in self.copies.items() for copy in copies]
        numbers = as_numbers([_content(copy.target) for _, copy in all_copies])
        return [
            HeldSlice(name, copy.size, copy.stride, copy.offset, number)
            for (name, copy), number in zip(all_copies, numbers, strict=True)
        ]

    def _addresses_now(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]


class PlanProof:
    """Shows on one update that vLLM itself loads where the plan says: see `first_difference`.

    By checksums, so that nothing of the update has to be kept.
    """

    def __init__(self, plan: InPlacePlan):
        self.plan = plan
        self._arrived: list[tuple[str, Copy, torch.Tensor]] = []

    def note(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Remember what tensors hold that vLLM is about to load."""
        for name, tensor in tensors:
            for copy in self.plan.copies[name]:
                self._arrived.append((name, copy, _content(copy.source(tensor))))

    def first_difference(self) -> str | None:
        """After vLLM has loaded: the first tensor that is not where the plan says, if any."""
        arrived = as_numbers([content for _, _, content in self._arrived])
        loaded = as_numbers([_content(copy.target) for _, copy, _ in self._arrived])
        for (name, _, _), sent, held in zip(self._arrived, arrived, loaded, strict=True):
            if sent != held:
                return name
        return None


class _LoadRecorder(TorchDispatchMode):
    """Notes copies from watched tensors into parameters, and does not do them."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        super().__init__()
        self.copies: dict[str, list[Copy]] = {}
        self._parameters = {_memory(parameter): name for name, parameter in parameters.items()}
        # Elements that something was loaded into; a tied head is one memory under two names.
        self._numel = {self._parameters[_memory(p)]: p.numel() for p in parameters.values()}
        self._filled = dict.fromkeys(self._numel, 0)
        self._watched: dict[int, str] = {}

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._watched[_memory(tensor)] = name
            self.copies[name] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        parameter = self._parameters.get(_memory(args[0])) if func in (COPY, FILL) else None
        if parameter is None:
            return func(*args, **(kwargs or {}))
        target = args[0]
        self._filled[parameter] += target.numel()
        if func is FILL:  # of a padded vocabulary: stays as it is
            return target
        source = args[1]
        name = self._watched.get(_memory(source))
        if name is None:
            raise CannotMap(f"{parameter} is filled with transformed weights")
        if source.dtype != target.dtype:
            raise CannotMap(f"{name} is {source.dtype}, {parameter} is {target.dtype}")
        if source.shape != target.shape:
            raise CannotMap(f"{name} is spread over {parameter}")
        layout = tuple(source.shape), tuple(source.stride()), source.storage_offset()
        self.copies[name].append(Copy(*layout, target.detach()))
        return target

    def check_complete(self) -> None:
        """Every tensor is used, and every element of every parameter is filled once."""
        unused = [name for name, copies in self.copies.items() if not copies]
        if unused:
            raise CannotMap(f"{unused[0]} goes nowhere")
        for name, numel in self._numel.items():
            if self._filled[name] != numel:
                raise CannotMap(f"{self._filled[name]} of {numel} elements of {name} are filled")


def _memory(tensor: torch.Tensor) -> int:
    """Which storage a tensor is a view of; also of tensors without memory."""
    return tensor.untyped_storage()._cdata


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """In elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _content(tensor: torch.Tensor) -> torch.Tensor:
    """Checksum of the elements, wherever they lie."""
    return checksum(tensor.contiguous().view(-1).view(torch.uint8))
