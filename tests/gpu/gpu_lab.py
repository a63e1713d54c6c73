"""Policies on GPUs, on processes that become one policy after the other, and a look into them."""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import dataclass, replace

import ray
import torch
from patience import PATIENCE_S
from policy_cases import LabRank
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.actors.rollout import RolloutActor
from rlsys.weight_sync.checksum import as_numbers, checksum

SHARE = 0.1
"""Share of a GPU in Ray's bookkeeping: all actors of the tests fit on two."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of the tests: one bundle each, and a last one of two GPUs where there are four."""

    group: ray.util.placement_group.PlacementGroup

    @classmethod
    def reserve(cls, number):
        sizes = [1, 1, 2] if number >= 4 else [1] * min(number, 2)
        group = placement_group(
            [{"GPU": size, "CPU": 0.1} for size in sizes], strategy="STRICT_PACK"
        )
        assert group.wait(60), "other processes of this Ray cluster hold its GPUs"
        return cls(group)

    def rank_by_rank(self, rank):
        """A `PlaceActor`: rank r on GPU r."""
        return self._options(rank, SHARE)

    def on(self, bundle):
        """A `PlaceActor`: everything on one GPU, the last one if there are fewer."""
        bundle = min(bundle, len(self.group.bundle_specs) - 1)
        return lambda rank: self._options(bundle, SHARE)

    def none(self, rank):
        """A `PlaceActor` for an actor that takes GPUs by itself."""
        return self._options(0, 0)

    def pair(self, rank):
        """A `PlaceActor` for an engine of two GPUs."""
        return self._options(2, 2)

    def _options(self, bundle, gpus):
        return {
            "num_cpus": 0.01,
            "num_gpus": gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self.group, placement_group_bundle_index=bundle
            ),
        }


class GpuRank(LabRank):
    """A rank that calls functions of the tests."""

    def become(self, config):
        """See LabRank.become; mcore-bridge, too, keeps a process group for its process."""
        super().become(config)
        if bridge := sys.modules.get("mcore_bridge.bridge.gpt_bridge"):
            bridge.EP_PP_GROUP = None
        if quantization := sys.modules.get("transformer_engine.pytorch.quantization"):
            quantization.FP8GlobalStateManager.reset()  # scales of the layers before

    def run(self, function, *args):
        return function(self, *args)

    def _export(self, weights):
        tensors = {name: tensor.cpu().clone() for name, tensor in weights.export()}
        return tensors if self.rank == 0 else None


def train(policy, batch, num_updates, *, start=None):
    """Log-probs at the start, and (loss, gradient norm) of every update.

    Old log-probs lie around `start`, those of another layout perhaps: the loss depends on the
    policy's own only then. At a ratio of 1 it is the mean advantage.
    """
    logprobs = policy.compute_logprobs(batch)[0]
    start = logprobs if start is None else start
    noise = 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    batch = replace(batch, old_logprobs=(start + noise) * batch.completion_mask)
    updates = [policy.update(batch).metrics for _ in range(num_updates)]
    return logprobs, [(metrics["loss"], metrics["grad_norm"]) for metrics in updates]


def use_config(rank, config):
    """Pack otherwise, for example; the model stays."""
    rank.config = rank.engine.config = config


def load_weights(rank, folder):
    """Take the weights of a model folder, while the GPU is busy with other things."""
    keep_gpu_busy(rank)
    rank.engine.weights.load(folder)


@torch.no_grad()
def negate_weights(rank):
    """Change all weights some time after the call, when the GPU comes to it."""
    keep_gpu_busy(rank)
    for parameter in rank.engine.model.parameters():
        parameter.mul_(-1.0)


def keep_gpu_busy(rank):
    """Tens of milliseconds of work on two other streams and on the current one; waits for none."""
    if not torch.cuda.is_available():
        return
    matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rank.busy = [matrix]  # outlives the work on it
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rank.busy += [matrix @ matrix for _ in range(20)]
    torch.cuda._sleep(20_000_000)  # cycles


def exported_checksums(rank):
    """Name -> checksum of what the policy holds, when all its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    tensors = dict(rank.engine.weights.export())
    content = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
    return dict(zip(tensors, as_numbers([checksum(data) for data in content]), strict=True))


def stall_in_bucket(rank, index, seconds):
    """Stop in the middle of a weight sync, with a part of it sent, and fail in the end."""
    (link,) = rank.links["rollout"]
    export = link.export

    def fill(bucket, buffer):
        if bucket.index == index:
            time.sleep(seconds)
            raise RuntimeError("the policy got stuck")
        type(export).fill(export, bucket, buffer)

    export.fill = fill


def update_with_little_memory(rank, batch, spare_bytes):
    """One update with so much GPU memory beside what is held already."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare_bytes) / total)
    try:
        rank.engine.update(batch)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class OpenActor(RolloutActor):
    """A rollout engine that its tests look into."""

    def __init__(self, config, device, engine_rank):
        if device == "cpu":
            import unpacked_workers

            from rlsys.engines.vllm import engine as vllm

            vllm.WORKER_EXTENSION = unpacked_workers.WORKER_EXTENSION
        super().__init__(config, device, engine_rank)

    async def ask_workers(self, method):
        return await self._call(lambda engine: engine.ask_workers(method))

    async def held_checksums(self):
        """Tensor name -> checksum of what the parameters hold, of an engine with one worker."""
        return await self._between_steps(lambda e: e._llm.collective_rpc(_held_checksums)[0])

    async def parameter_checksums(self):
        """vLLM's name -> checksum of each parameter, however it was loaded."""
        return await self._between_steps(lambda e: e._llm.collective_rpc(_parameter_checksums)[0])

    async def set_in_flight_kv(self, value):
        await self._between_steps(_set_in_flight_kv, value)

    async def least_tokens(self):
        """Fewest tokens of a completion in flight."""
        return await self._between_steps(_least_tokens)

    async def free_bytes(self):
        """Free memory of its GPU."""
        on_gpu = torch.cuda.is_available()
        return await self._between_steps(lambda _: torch.cuda.mem_get_info()[0] if on_gpu else 0)

    async def scribble(self, nbytes):
        """Fill memory that is free with NaN, and free it again."""

        def fill(engine):
            torch.full((nbytes // 4,), torch.nan, device="cuda")
            torch.cuda.empty_cache()

        await self._between_steps(fill)

    async def hold(self, nbytes):
        """Keep that much of its GPU from everybody else; 0 lets it go."""
        self._held = None
        self._held = torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    async def do_nothing(self, seconds):
        """Neither sample nor answer, as a process that hangs."""
        await self._between_steps(lambda engine: time.sleep(seconds))

    async def _between_steps(self, function, *args):
        return await self._call(lambda engine: function(engine, *args))


class ReloadingGpuActor(OpenActor):
    """Starts one engine after the other in a process."""

    def __init__(self, config, device, engine_rank):
        super().__init__(config, device, engine_rank)
        self._place = device, engine_rank

    def reload(self, config):
        self._loop.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            _allow_graphs()
        self.__init__(config, *self._place)
        self._loop.built.result(PATIENCE_S)


class CrossedActor(OpenActor):
    """An engine of two workers on the two GPUs of a policy, each on that of the other's sender.

    NCCL does not allow two ranks on one GPU: worker i and policy rank i share a connection, no GPU.
    """

    def __init__(self, config, device, engine_rank):
        os.environ["CUDA_VISIBLE_DEVICES"] = "1,0"  # Ray gave it none, and CUDA has not begun
        super().__init__(config, device, engine_rank)


def _allow_graphs():
    """vLLM forbids CUDA graphs once an engine has its own, and not all engines allow them again."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(True)


def _held_checksums(worker):
    from rlsys.engines.vllm.in_place import content_checksum

    plan = worker.weight_transfer_engine._plan
    checksums = [
        content_checksum(copy.target) for copies in plan.copies.values() for copy in copies
    ]
    names = [name for name, copies in plan.copies.items() for _ in copies]
    return dict(zip(names, as_numbers(checksums), strict=True))


def _parameter_checksums(worker):
    from rlsys.engines.vllm.in_place import content_checksum

    parameters = dict(worker.model_runner.model.named_parameters())
    checksums = [content_checksum(parameter.data) for parameter in parameters.values()]
    return dict(zip(parameters, as_numbers(checksums), strict=True))


def _set_in_flight_kv(engine, value):
    rollout = engine._config.rollout.model_copy(update={"in_flight_kv": value})
    engine._config = engine._config.model_copy(update={"rollout": rollout})


def _least_tokens(engine):
    states = engine._llm.llm_engine.output_processor.request_states.values()
    return min((state.detokenizer.num_output_tokens() for state in states), default=0)
