"""Weight transport between processes that share a GPU, or one host's memory: no network.

Rank 0 shares the memory that holds its two buckets, once, when it connects: by a CUDA IPC handle on
a GPU, as a file without a name on CPU. To broadcast, it says through the store where in that memory
a bucket is. Each receiver copies it to its own buffer and answers. So a bucket costs each side one
wait for the store, about 0.1 ms on one host.

A receiver never reads a bucket before it is filled: rank 0 waits until its stream has filled the
bucket, and only then says where it is. Rank 0 never overwrites a bucket before it is read: a
receiver waits until its stream has copied the bucket, and only then answers. Every message and
every answer has a key of its own.

The floor of an update on one GPU is its bytes times what the memory moves for each: 2 to fill a
bucket, 2 to copy it, 2 to load it and, verified, 1 for a checksum on either side. An H200 reads and
writes 4.3 TB/s, so 3.09 GB (1.5B parameters) take 5.7 ms, and 4.3 ms without checksums.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsys.weight_sync.transport import EXTRA_RECEIVER_S, Transport, transports

SMALL_BYTES = 1 << 20
"""Most bytes that travel through the store, because they are not in the shared memory."""
_CONTENT = b"content:"
_EXPANDABLE = "expandable_segments:True"


@transports.register("ipc")
class IpcTransport(Transport):
    """Copies between processes on one GPU, or on one host if both sides are on CPU."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._num_messages = 0
        """Messages that this rank has sent, or answered."""
        self._answered: list[str] = []
        """Rank 0's keys in the store that nobody needs any more."""

    @property
    def buffer_device(self) -> torch.device:
        """This rank's device."""
        return self.device

    def sending_memory(self, num_buffers: int, nbytes: int) -> torch.Tensor:
        """Zeros [num_buffers, nbytes] uint8 that other processes can open."""
        if self.device.type == "cpu":
            return _memory_file(num_buffers, nbytes)
        with torch.cuda.device(self.device), _exportable_memory():
            return torch.zeros(num_buffers, nbytes, dtype=torch.uint8, device=self.device)

    def _join(self, store: dist.Store, timeout: timedelta) -> None:
        if self._rank > 0:
            handles = json.loads(self._next_message())
            self._shared = _open(handles[str(self._rank)], self.device)
            self._answer()
            return
        assert self._memory is not None, "rank 0 connects with the memory that it sends from"
        self._shared = self._memory
        # A handle for each receiver, since torch counts who has closed one.
        handles = {str(rank): _handle(self._memory) for rank in self._receivers}
        self._say(json.dumps(handles).encode())()

    def _begin_broadcast(self, buffer: torch.Tensor) -> Callable[[], None]:
        if self._rank > 0:
            return lambda: self._copy_next(buffer)
        self._finish_stream()
        return self._say(self._message(buffer))

    def _say(self, message: bytes) -> Callable[[], None]:
        """Say something to all receivers; the returned function waits for their answers."""
        number = self._num_messages
        self._num_messages += 1
        self._store.set(f"said/{number}", message)
        for key in self._answered:
            self._store.delete_key(key)
        self._answered.clear()
        answers = {f"said/{number}/{rank}": rank for rank in self._receivers}

        def wait() -> None:
            self._wait_for(answers)
            self._answered += [f"said/{number}", *answers]

        return wait

    def _next_message(self) -> bytes:
        key = f"said/{self._num_messages}"
        patience_s = self._connection.timeout_s + EXTRA_RECEIVER_S
        self._store.wait([key], timedelta(seconds=patience_s))
        message: bytes = self._store.get(key)
        return message

    def _answer(self) -> None:
        self._store.set(f"said/{self._num_messages}/{self._rank}", "")
        self._num_messages += 1

    def _copy_next(self, buffer: torch.Tensor) -> None:
        message = self._next_message()
        if message.startswith(_CONTENT):
            sent = torch.frombuffer(bytearray(message.removeprefix(_CONTENT)), dtype=torch.uint8)
        else:
            start = int(message)
            sent = self._shared[start : start + buffer.numel()]
        buffer.copy_(sent)
        self._finish_stream()
        self._answer()

    def _message(self, buffer: torch.Tensor) -> bytes:
        """Where `buffer` is in the shared memory; its content if it is elsewhere."""
        start = buffer.data_ptr() - self._shared.data_ptr()
        if 0 <= start <= self._shared.numel() - buffer.numel():
            return str(start).encode()
        assert buffer.numel() <= SMALL_BYTES, "buckets are sent from `sending_memory`"
        return _CONTENT + buffer.cpu().numpy().tobytes()

    @property
    def _receivers(self) -> range:
        return range(1, self._connection.world_size)

    def _finish_stream(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _memory_file(*shape: int) -> torch.Tensor:
    """Zeros of uint8 in a file without a name, which lives as long as somebody uses it."""
    file = os.memfd_create("rlsys-weight-sync")
    path = f"/proc/{os.getpid()}/fd/{file}"
    memory = _tensor(torch.UntypedStorage.from_file(path, True, math.prod(shape))).view(shape)
    weakref.finalize(memory, os.close, file)  # who has opened it by then keeps the memory
    return memory


@contextmanager
def _exportable_memory() -> Iterator[None]:
    """Within this context, torch takes memory that CUDA IPC can export, in blocks of its own.

    Expandable segments cannot be exported. In a block of its own, the memory keeps nothing else
    from being freed.
    """
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    expands = _EXPANDABLE in settings
    if expands:
        _set_allocator(settings.replace(_EXPANDABLE, "expandable_segments:False"))
    try:
        with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
            yield
    finally:
        if expands:
            _set_allocator(settings)


def _set_allocator(settings: str) -> None:
    torch._C._accelerator_setAllocatorSettings(settings)  # type: ignore[attr-defined]


def _handle(memory: torch.Tensor) -> dict[str, Any]:
    """What another process needs to open `memory`."""
    storage = memory.untyped_storage()
    assert memory.numel() == storage.nbytes(), "not memory of `sending_memory`"
    handle: dict[str, Any] = {"place": _place(memory.device)}
    if memory.device.type == "cpu":
        return handle | {"file": storage.filename, "nbytes": storage.nbytes()}
    _, *parts = storage._share_cuda_()
    return handle | {"cuda": [p.hex() if isinstance(p, bytes) else p for p in parts]}


def _open(handle: dict[str, Any], device: torch.device) -> torch.Tensor:
    """The memory [nbytes] uint8 that another process shares."""
    own = _place(device)
    if handle["place"] != own:
        raise RuntimeError(f"the sender's memory is on {handle['place']}, this rank on {own}")
    if device.type == "cpu":
        return _tensor(torch.UntypedStorage.from_file(handle["file"], True, handle["nbytes"]))
    with torch.cuda.device(device):
        parts = [bytes.fromhex(p) if isinstance(p, str) else p for p in handle["cuda"]]
        return _tensor(torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *parts))


def _tensor(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _place(device: torch.device) -> str:
    """Names the memory that processes can share: that of a GPU, or of a host."""
    if device.type == "cuda":
        return f"GPU {torch.cuda.get_device_properties(device).uuid}"
    return f"host {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
