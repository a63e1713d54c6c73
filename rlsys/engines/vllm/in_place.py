"""New weights straight into vLLM's own parameters: a plan made once, then a few large copies.

vLLM's loader knows where a Hugging Face tensor goes: which rows of a fused parameter, which shard
of a tensor-parallel rank. Running its Python code for every tensor takes ten times as long as
moving the bytes. So it runs once, on tensors without memory, and a recorder turns each copy that it
makes into an entry of the plan. This needs no table of models and covers all that vLLM can load. A
tensor that the loader changes before the copy is an error, CannotMap.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsys.engines.vllm.latent import loaded_parameters
from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.copies import CopyPlan, holds_exactly
from rlsys.weight_sync.plan import DTYPES, Bucket, TensorMeta, TensorSlice

COPY, FILL = torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar


class CannotMap(ValueError):
    """Weights cannot be copied in place; the message names the tensor and the reason."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A slice of a Hugging Face tensor, and the slice of vLLM's parameter where it goes."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Start of the slice in the contiguous Hugging Face tensor, in elements."""
    target: torch.Tensor
    """Shares the memory of the parameter."""

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slice of a tensor that has arrived."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def box_of(self, meta: TensorMeta) -> TensorSlice | None:
        """The slice as a box of the Hugging Face tensor; None if it is not a box."""
        strides = _contiguous_strides(meta.shape)
        if self.stride != strides:
            return None
        starts, rest = [], self.offset
        for stride in strides:
            start, rest = divmod(rest, stride)
            starts.append(start)
        ends = (start + size for start, size in zip(starts, self.size, strict=True))
        if any(end > size for end, size in zip(ends, meta.shape, strict=True)):
            return None  # it continues from the end of a row in the next
        return TensorSlice(meta, tuple(starts), self.size)


class InPlacePlan:
    """Where every tensor of a weight sync goes in one worker's model.

    Args:
        model: vLLM's model, loaded.
        metadata: every tensor that the policy exports, whole.

    Raises:
        CannotMap: vLLM transforms a tensor while loading it, or no tensor fills a parameter.
    """

    def __init__(self, model: torch.nn.Module, metadata: Sequence[TensorMeta]):
        parameters = dict(loaded_parameters(model))
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
        self._padding = recorder.padding
        self._metadata = list(metadata)
        self._arriving = self.copies
        """The copies of each tensor or slice that arrives, by its name."""
        self._parameters = list(parameters.values())
        self._addresses = self._addresses_now()
        self._loads: dict[int, tuple[int, CopyPlan]] = {}
        """By bucket index: the address of its buffer, and the copies from there."""

    @property
    def is_stale(self) -> bool:
        """Whether parameters have moved: then the plan would write where nobody reads."""
        return self._addresses_now() != self._addresses

    def fill_padding(self) -> None:
        """Fill what no tensor fills: an engine that slept has lost it."""
        for padding, value in self._padding:
            padding.fill_(value)

    def load(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Copy the tensors in `buffer` [nbytes] uint8 to their parameters.

        On a GPU in the current stream. It is fast if a bucket comes in the same buffer again.
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
        """The slices that this worker needs, in the order of the tensors."""
        return tuple(self._by_slice())

    def expect(self, slices: Sequence[TensorSlice]) -> None:
        """Expect only the `needed` slices in `load` from now on, and not whole tensors."""
        by_slice = self._by_slice()
        assert list(by_slice) == list(slices), "other slices than this worker asked for"
        self._arriving = {piece.meta.name: copies for piece, copies in by_slice.items()}
        self._loads.clear()

    def _by_slice(self) -> dict[TensorSlice, list[Copy]]:
        """The copies from each slice, with offsets in the slice instead of the whole tensor."""
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

    def _addresses_now(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]


class PlanProof:
    """Checks on one update that vLLM's loader puts tensors where the plan says.

    It compares checksums, so that the tensors need not be kept.
    """

    def __init__(self, plan: InPlacePlan):
        self.plan = plan
        self._arrived: list[tuple[str, Copy, torch.Tensor]] = []

    def note(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Remember the content of tensors that vLLM is about to load."""
        for name, tensor in tensors:
            for copy in self.plan.copies[name]:
                arrived = copy.source(tensor).to(copy.target.dtype)
                self._arrived.append((name, copy, content_checksum(arrived)))

    def first_difference(self) -> str | None:
        """The first tensor that vLLM has not loaded where the plan says; None if all are there."""
        arrived = as_numbers([content for _, _, content in self._arrived])
        loaded = as_numbers([content_checksum(copy.target) for _, copy, _ in self._arrived])
        for (name, _, _), sent, held in zip(self._arrived, arrived, loaded, strict=True):
            if sent != held:
                return name
        return None


class _LoadRecorder(TorchDispatchMode):
    """Records copies from watched tensors into parameters, without executing them."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        super().__init__()
        self.copies: dict[str, list[Copy]] = {}
        self.padding: list[tuple[torch.Tensor, float]] = []
        """The parts of parameters that get one number instead of a tensor, and the number."""
        self._parameters = {_memory(parameter): name for name, parameter in parameters.items()}
        # Elements filled so far, by parameter; a tied head is one memory with two names.
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
        if func is FILL:  # the padding of a vocabulary
            self.padding.append((target.detach(), args[1]))
            return target
        source = args[1]
        name = self._watched.get(_memory(source))
        if name is None:
            raise CannotMap(f"{parameter} is filled with transformed weights")
        if not holds_exactly(target.dtype, source.dtype):
            raise CannotMap(f"{name} is {source.dtype}, {parameter} is {target.dtype}")
        if source.shape != target.shape:
            raise CannotMap(f"{name} is spread over {parameter}")
        layout = tuple(source.shape), tuple(source.stride()), source.storage_offset()
        self.copies[name].append(Copy(*layout, target.detach()))
        return target

    def check_complete(self) -> None:
        """Raise CannotMap unless all tensors are used and all elements filled once."""
        unused = [name for name, copies in self.copies.items() if not copies]
        if unused:
            raise CannotMap(f"{unused[0]} goes nowhere")
        for name, numel in self._numel.items():
            if self._filled[name] != numel:
                raise CannotMap(f"{self._filled[name]} of {numel} elements of {name} are filled")


def _memory(tensor: torch.Tensor) -> int:
    """Identity of the storage that a tensor is a view of; works for tensors without memory."""
    return tensor.untyped_storage()._cdata


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def content_checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Checksum of the elements, whatever their strides."""
    return checksum(tensor.contiguous().view(-1).view(torch.uint8))


def missing_parameters(parameter_names: set[str], loaded: set[str]) -> list[str]:
    """The parameters that vLLM's loader does not report as loaded, sorted.

    vLLM 0.26 loads `experts.routed_experts.w2_weight` and reports `experts.w2_weight`.
    """
    return sorted(
        name
        for name in parameter_names - loaded
        if name.replace(".routed_experts.", ".") not in loaded
    )
