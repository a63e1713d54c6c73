"""What the policy holds on its GPU waits in host memory while rollout engines have the GPU.

megatron-core's own `offload_to_cpu` gives each tensor new memory that is not pinned: copies are
slow, wait for each other, and fp32 parameters lose the place in their buffer. Here a storage, the
memory that any number of tensors view, becomes empty, and later gets memory and its bytes again. So
parameters, buffers, their views and the optimizer's state stay the same objects.

Gradients are dropped, since each update begins with zeros. So are FP8 copies of weights, which the
first micro-batch of any pass makes.

What stays on the GPU: the buckets of weight sync and what other ranks send for them, the angles of
rotary embeddings, buffers such as the biases of routers, FP8 scales, and workspaces of libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fp8_utils import is_float8tensor

from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.model.host_memory import LARGE_WEIGHTS, slab_sizes

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

    from rlsys.engines.megatron.lora import Adapters

_ALIGNMENT = 512
"""Bytes: where a storage may begin in host memory."""


class HostCopy:
    """The bytes of storages that wait in pinned host memory.

    Copies run in `stream`, behind what the current stream holds when they are requested. Host
    memory is pinned once and used again.

    Args:
        what: the storages hold, for the error of a host without enough memory.
        stream: copies of one policy share it, so that they run in the order of their requests.
        pinned: whether host memory is pinned, for copies between it and a GPU.
    """

    def __init__(self, what: str, stream: torch.cuda.Stream, *, pinned: bool):
        self._what, self._stream, self._pinned = what, stream, pinned
        self._slabs: list[torch.Tensor] = []
        self._storages: list[tuple[torch.UntypedStorage, int]] = []
        self._held: list[tuple[torch.UntypedStorage, int]] = []
        """The storages whose bytes the slabs hold."""
        self._copied = torch.cuda.Event()

    def reserve(self, num_bytes: int) -> None:
        """Have host memory for `num_bytes`: pinning takes seconds, which a start has.

        Raises:
            torch.OutOfMemoryError: the host has less.
        """
        with out_of_memory_explained(
            f"{num_bytes / 2**30:,.1f} GiB of pinned pages, in which {self._what} waits: set "
            "colocated.offload_weights or colocated.offload_optimizer to false, or use a host with "
            "more memory",
            memory="Host memory",
        ):
            self._slabs += [
                torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
                for size in slab_sizes(num_bytes - sum(map(len, self._slabs)))
            ]

    def leave(self, storages: Iterable[torch.UntypedStorage], *, unchanged: bool = False) -> None:
        """Start copying to the host; until `release` the storages keep their memory.

        `unchanged` storages are not copied again, if they are those of the last time.
        """
        assert not self._storages, "they wait in host memory already"
        self._storages = [(storage, storage.nbytes()) for storage in storages]
        if not (unchanged and _identities(self._storages) == _identities(self._held)):
            self.reserve(sum(_aligned(size) for _, size in self._storages))
            self._copy(to_host=True)
            self._held = self._storages

    def forget(self) -> None:
        """Copy the next time, since the storages have changed."""
        self._held = []

    def release(self) -> None:
        """Wait for the copies, and free the memory of the storages."""
        self._copied.synchronize()
        for storage, _ in self._storages:
            storage.resize_(0)

    def come_back(self) -> None:
        """Give the storages memory, and start copying into it; see `wait`."""
        for storage, size in self._storages:
            storage.resize_(size)
        self._copy(to_host=False)
        self._storages = []

    def wait(self) -> None:
        """Let the current stream wait for the copies; the host goes on."""
        torch.cuda.current_stream().wait_event(self._copied)

    def _copy(self, *, to_host: bool) -> None:
        # Kernels before this call may write what is copied, or read what was in new memory.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for on_gpu, on_host in self._pieces():
                target, source = (on_host, on_gpu) if to_host else (on_gpu, on_host)
                target.copy_(source, non_blocking=True)
            self._copied.record()

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(on the GPU, on the host): bytes of each storage, cut where slabs end."""
        slabs = iter(self._slabs)
        free = torch.empty(0, dtype=torch.uint8)
        for storage, size in self._storages:
            on_gpu = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            while size > 0:
                if not len(free):
                    free = next(slabs)
                length = min(size, len(free))
                yield on_gpu[:length], free[:length]
                on_gpu, size, free = on_gpu[length:], size - length, free[_aligned(length) :]


class Offload:
    """Moves what one policy rank holds on its GPU to host memory, and back.

    Args:
        chunks: the bare models.
        ddp: their wrappers, which have the gradients.
        optimizer: of the chunks.
        adapters: beside the weights, if there are any.
        moves: False where there is no other memory to move to, as on CPU: then only gradients are
            freed, and everything else is as if it had moved.
    """

    def __init__(
        self,
        chunks: torch.nn.ModuleList,
        ddp: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        adapters: Adapters | None,
        *,
        moves: bool,
    ):
        self.moves = moves
        self._chunks, self._ddp, self._adapters = chunks, ddp, adapters
        self._optimizer = optimizer
        self._device = next(chunks[0].parameters()).device
        stream, pinned = torch.cuda.Stream(), self._device.type == "cuda"
        self._weights = HostCopy("the policy's weights", stream, pinned=pinned)
        self._frozen = HostCopy("the policy's frozen weights", stream, pinned=pinned)
        self._state = HostCopy("the optimizer's state", stream, pinned=pinned)
        self._gradients: list[tuple[torch.UntypedStorage, int]] = []
        self._has_weights = self._has_optimizer = True
        self._leaving: list[HostCopy] = []
        self._is_returning = False

    def check(self, call: str, *, optimizer: bool = False) -> None:
        """Assert that what `call` reads is here: the weights, and perhaps the optimizer."""
        assert self._has_weights, f"{call}: the policy's weights are in host memory, see onload"
        assert not (optimizer and self._gradients), f"{call}: gradients were dropped, see onload"
        assert self._has_optimizer or not optimizer, (
            f"{call}: the optimizer's state is in host memory, see onload"
        )

    def reserve(self, state_bytes: int, *, weights: bool) -> None:
        """Pin host memory for the optimizer's state, and perhaps for the weights."""
        if self.moves:
            self._state.reserve(state_bytes)
            for copy, storages in self._weight_storages() if weights else ():
                copy.reserve(_num_bytes(storages))

    @property
    def has_large_weights(self) -> bool:
        """Whether they are so large that colocated.offload_weights auto moves them; on CPU True."""
        if self._device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self._device).total_memory
        size = sum(_num_bytes(storages) for _, storages in self._weight_storages())
        return size > LARGE_WEIGHTS * total

    def frozen_weights_changed(self) -> None:
        """Say that parameters without gradients have other values, as after loading."""
        self._frozen.forget()

    def drop_gradients(self) -> None:
        """Free the memory of gradients, and of what else each update makes again."""
        if self._gradients:
            return
        self._forget_copies()
        kept = _storages(self._weight_tensors(), self._device)
        storages = _storages(self._gradient_tensors(), self._device)
        self._gradients = [(s, s.nbytes()) for place, s in storages.items() if place not in kept]
        for storage, _ in self._gradients:
            storage.resize_(0)
        # Before copies begin: giving memory back waits for all that the GPU has to do.
        torch.cuda.empty_cache()

    def offload_optimizer(self) -> None:
        """Drop gradients, and start moving the optimizer's state, which `finish` ends."""
        if self._has_optimizer:
            self.drop_gradients()
            weights = _storages(self._weight_tensors(), self._device)
            state = _storages(_state_tensors(self._optimizer), self._device)
            # Parameters that the optimizer updates in place are weights.
            self._leave(self._state, [s for place, s in state.items() if place not in weights])
            self._has_optimizer = False

    def offload_weights(self) -> None:
        """Move the weights, and wait until the memory of all that moves is free."""
        if self._has_weights:
            for copy, storages in self._weight_storages():
                self._leave(copy, storages, unchanged=copy is self._frozen)
            self._has_weights = False
        self.finish()

    def finish(self) -> None:
        """Wait until what is being moved is in host memory, and free the GPU's."""
        for copy in self._leaving:
            copy.release()
        if self._leaving:
            torch.cuda.empty_cache()
        self._leaving = []

    def onload(self) -> None:
        """Bring everything back: the optimizer's state may arrive while gradients are computed."""
        self.finish()
        with out_of_memory_explained(
            "the policy's weights, gradients and optimizer state, which come back for an update "
            "beside what sleeping engines keep: set policy.optimizer_cpu_offload or policy.lora, "
            "or use more GPUs"
        ):
            if not self._has_weights:
                for copy in (self._weights, self._frozen):
                    copy.come_back()
                    copy.wait()
            for storage, size in self._gradients:  # each update begins with zeros
                storage.resize_(size)
            if not self._has_optimizer:
                self._state.come_back()
                self._is_returning = True
        self._gradients = []
        self._has_weights = self._has_optimizer = True

    def await_optimizer(self) -> None:
        """Let the GPU wait for the optimizer's state before it reads that."""
        if self._is_returning:
            self._state.wait()
            self._is_returning = False

    def _leave(
        self, copy: HostCopy, storages: Iterable[torch.UntypedStorage], *, unchanged: bool = False
    ) -> None:
        copy.leave(storages if self.moves else [], unchanged=unchanged)
        self._leaving.append(copy)

    def changing_tensors(self) -> Iterator[torch.Tensor]:
        """What updates change beside the optimizer's state: trained weights, and all buffers."""
        yield from self._weight_tensors(trained=True)
        yield from self._chunks.buffers()

    def _weight_tensors(self, *, trained: bool | None = None) -> Iterator[torch.Tensor]:
        for parameter in self._chunks.parameters():
            if trained in (None, parameter.requires_grad):
                yield from memory_of(parameter)
        if self._adapters is not None and not trained:
            yield from self._adapters.base_of_saved

    def _weight_storages(self) -> list[tuple[HostCopy, list[torch.UntypedStorage]]]:
        """Memory of trained weights, and of frozen ones, which are copied to the host once."""
        trained, frozen = (
            _storages(self._weight_tensors(trained=trained), self._device)
            for trained in (True, False)
        )
        alone = [storage for place, storage in frozen.items() if place not in trained]
        return [(self._weights, list(trained.values())), (self._frozen, alone)]

    def _gradient_tensors(self) -> Iterator[torch.Tensor]:
        for chunk in self._ddp:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                yield buffer.grad_data
                for parameter in buffer.params:  # a few may have gradients outside of it
                    yield parameter.main_grad

    def _forget_copies(self) -> None:
        """Forget gradients of another type than their buffer's, and FP8 copies of weights."""
        self._optimizer.zero_grad()
        for one in inner_optimizers(self._optimizer):
            # megatron-core's optimizer on two devices keeps them; on the CPU it needs them.
            for copy in getattr(one, "param_to_fp32_param", {}).values():
                if copy.device == self._device:
                    copy.grad = None
        for module in self._chunks.modules():
            if hasattr(module, "_fp8_workspaces"):
                module._fp8_workspaces.clear()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _identities(storages: Iterable[tuple[torch.UntypedStorage, int]]) -> list[tuple[int, int]]:
    return [(storage._cdata, size) for storage, size in storages]


def _num_bytes(storages: Iterable[torch.UntypedStorage]) -> int:
    """What they take in host memory."""
    return sum(_aligned(storage.nbytes()) for storage in storages)


def _storages(
    tensors: Iterable[torch.Tensor], device: torch.device
) -> dict[int, torch.UntypedStorage]:
    """The memory that tensors have on `device`, each by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device == device)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def memory_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with the memory of one: itself, or those that make up one in FP8."""
    if is_float8tensor(tensor):
        parts = vars(tensor).items()
        yield from (v for name, v in parts if name[0] == "_" and isinstance(v, torch.Tensor))
    else:
        yield tensor


def inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """torch's optimizers in megatron-core's: one for each kind of parameter, or device."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer is not None:  # None if this rank has no parameter of a kind
            yield one.optimizer
            yield from getattr(one.optimizer, "sub_optimizers", [])


def _state_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """What an optimizer updates, and what it keeps for each parameter."""
    for one in inner_optimizers(optimizer):
        for group in one.param_groups:
            for parameter in group["params"]:
                yield from memory_of(parameter)
        for state in one.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield from memory_of(value)
