"""The two sides of benchmarks/weight_sync_gpu.py, which measure where their time goes."""

import os
import time
from functools import partial

import torch

from rlsys.actors.policy import PolicyRank
from rlsys.actors.rollout import RolloutActor
from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.sender import Stopwatch
from rlsys.weight_sync.transport import LOOPBACK, make_transport

TIMEOUT_S = 60.0
NATIVE = {"packed": True, "packed_buffer_size_bytes": 512 << 20, "packed_num_buffers": 3}


def bare_connection(port, world_size):
    """A connection without slices, for bare broadcasts."""
    return Connection((), 0, "auto", LOOPBACK, port, world_size, 0, False, False, TIMEOUT_S)


def bare_broadcasts(_, rank, port, world_size, sizes, repeats):
    """Seconds of broadcasts of buffers of `sizes` bytes, all at once, by a group of its own."""
    transport = make_transport("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    transport.connect(bare_connection(port, world_size), rank)
    device = transport.buffer_device
    buffers = [torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
    meeting = torch.zeros(8, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(repeats):
        transport.broadcast(meeting, what="meeting")()
        watch = Stopwatch(device)
        waits = [
            transport.broadcast(buffers[i % 2][:size], what=f"bare broadcast {i}")
            for i, size in enumerate(sizes)
        ]
        for wait in waits:
            wait()
        watch.stop()
        seconds.append(watch.seconds())
    return seconds


def join_native(worker, port, world_size):
    """vLLM's own NCCL weight transfer into the same model, beside that of rlsys."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferEngine,
        NCCLWeightTransferInitInfo,
    )

    own = worker.weight_transfer_engine
    config = WeightTransferConfig(backend="nccl")
    worker.native = NCCLWeightTransferEngine(config, own.vllm_config, own.device, own.model)
    worker.native.init_transfer_engine(NCCLWeightTransferInitInfo(LOOPBACK, port, 1, world_size))


def receive_native(worker, names, dtype_names, shapes):
    info = {"names": names, "dtype_names": dtype_names, "shapes": shapes, **NATIVE}
    worker.native.start_weight_update()
    worker.native.update_weights(info)
    worker.native.finish_weight_update()


def held_slices(worker):
    """(tensor, size, stride, offset, checksum) of what a worker's parameters hold."""
    from rlsys.engines.vllm.in_place import content_checksum

    plan = worker.weight_transfer_engine._plan
    copies = [(name, copy) for name, copies in plan.copies.items() for copy in copies]
    numbers = as_numbers([content_checksum(copy.target) for _, copy in copies])
    return [
        (name, copy.size, copy.stride, copy.offset, number)
        for (name, copy), number in zip(copies, numbers, strict=True)
    ]


class OpenRank(PolicyRank):
    """A policy whose weights change without training, and that reports its times."""

    @torch.no_grad()
    def change_weights(self):
        for parameter in self.engine.model.parameters():
            if self.engine.adapters is None:
                parameter.copy_(parameter.flatten().roll(1).view_as(parameter))
            elif parameter.requires_grad:
                parameter.normal_(std=0.01)  # B begins with zeros
        self._synchronize()

    def send_weights(self, version, *, to):
        start = time.perf_counter()
        sent = super().send_weights(version, to=to)
        self.send_seconds = time.perf_counter() - start
        return sent

    def seconds_of_send(self):
        return self.send_seconds

    def seconds_of_packing(self, to, repeats):
        """Every bucket of this rank's part, and nothing sent to the engines."""
        seconds = []
        for _ in range(repeats):
            self._synchronize()
            start = time.perf_counter()
            for link in self.links[to]:
                if link.sender is None:
                    link.export.contribute()
                else:
                    for bucket in link.sender._buckets:
                        link.export.fill(bucket, link.sender._buffer(bucket))
            launched = time.perf_counter() - start
            self._synchronize()
            seconds.append((launched, time.perf_counter() - start))
        return seconds[-1]

    def num_connections(self, to):
        return len(self.links[to])

    def slices_checksums(self, slices):
        """Checksums of (tensor, size, stride, offset), by one-by-one export."""
        tensors = {name: tensor.contiguous() for name, tensor in self.engine.weights.export()}
        if self.rank != 0:
            return None
        parts = [
            tensors[name].view(-1)[offset:].as_strided(size, stride)
            for name, size, stride, offset in slices
        ]
        content = [part.contiguous().view(-1).view(torch.uint8) for part in parts]
        return as_numbers([checksum(data) for data in content])

    def bare(self, *arguments):
        return bare_broadcasts(None, *arguments) if self.rank == 0 else None

    def join_native(self, port, world_size):
        if self.rank == 0:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            self.native = trainer_init(
                {"master_address": LOOPBACK, "master_port": port, "world_size": world_size}
            )

    def send_native(self):
        tensors = self.engine.weights.export()
        if self.rank != 0:
            return list(tensors) and None
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerSendWeightsArgs,
            NCCLWeightTransferEngine,
        )

        arguments = NCCLTrainerSendWeightsArgs(group=self.native, **NATIVE)
        NCCLWeightTransferEngine.trainer_send_weights(tensors, arguments)
        return self._synchronize()

    def _synchronize(self):
        if not self.engine.on_cpu:
            torch.cuda.synchronize()


class OpenActor(RolloutActor):
    """A rollout actor that reports what its engine's parameters hold, and where its time goes."""

    def __init__(self, config, device, engine_rank):
        if device == "cpu":  # multiply with the parameters themselves, as on GPUs
            from vllm import _custom_ops

            _custom_ops._supports_onednn = False
        super().__init__(config, device, engine_rank)

    async def instrument(self):
        self.seconds = {}
        await self._call(lambda engine: self._time_parts(engine))

    def _time_parts(self, engine):
        for owner, names in (
            (engine, ["start_weight_update", "_pause", "update_weights", "_drop_stale_cache"]),
            (engine._llm, ["update_weights", "finish_weight_update"]),
        ):
            for name in names:
                label = name if owner is engine else f"vllm {name}"
                setattr(owner, name, partial(self._timed, label, getattr(owner, name)))

    def _timed(self, label, function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[label] = time.perf_counter() - start
        return result

    async def seconds_of_parts(self):
        return self.seconds

    async def ask_workers(self, method):
        return await self._call(lambda engine: engine.ask_workers(method))

    async def on_workers(self, function, *arguments):
        """`function(worker, *arguments)` on every worker."""
        return await self._call(lambda e: e._llm.collective_rpc(function, args=arguments))

    async def on_workers_by_rank(self, function, *arguments):
        """Like `on_workers`, with the worker's rank in the group as the first argument."""
        return await self.on_workers(partial(with_rank, function), *arguments)


class CrossedActor(OpenActor):
    """An engine of two workers on the two GPUs of a policy, each on that of the other's sender.

    NCCL does not allow two ranks on one GPU: worker i and policy rank i share a connection, no GPU.
    """

    def __init__(self, config, device, engine_rank):
        os.environ["CUDA_VISIBLE_DEVICES"] = "1,0"  # Ray gave it none, and CUDA has not begun
        super().__init__(config, device, engine_rank)


def with_rank(function, worker, *arguments):
    rank = 1 + worker.weight_transfer_engine.parallel_config.rank
    return function(worker, rank, *arguments)
