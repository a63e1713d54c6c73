"""The receiving side of weight sync in vLLM: a backend of vLLM's own weight transfer.

`WORKER_EXTENSION` names a class in this module, so vLLM imports it in every process that holds a
part of the model. The import registers the backend, and lets a worker report why it could not
start. vLLM calls `init_transfer_engine` once for each connection, and for every update
`start_weight_update`, `update_weights` and `finish_weight_update`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.engines.profiling import TorchTrace, Traced
from rlsys.engines.vllm.adapters import use_adapter, without_adapters
from rlsys.engines.vllm.in_place import CannotMap, InPlacePlan, PlanProof, missing_parameters
from rlsys.engines.vllm.latent import derive_again, loaded_parameters, unreachable_copy
from rlsys.engines.vllm.quantised import made_by_quantising
from rlsys.engines.vllm.routed_experts import connect_cpu_runner
from rlsys.engines.vllm.sleeping import KeptMemory, Tag
from rlsys.engines.vllm.worker_errors import leave_errors
from rlsys.stacks import answer_for_stacks
from rlsys.types import Device
from rlsys.weight_sync.connection import Connection, Endpoint
from rlsys.weight_sync.plan import TensorSlice
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.transport import WeightSyncError

BACKEND = "rlsys"
WORKER_EXTENSION = "rlsys.engines.vllm.weight_backend.WeightSyncWorkerExtension"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """The endpoints of this engine's workers, in their order."""

    endpoints: Sequence[Endpoint]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The policy version of the weights that an update brings."""

    policy_version: int


class BucketWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what a `WeightSender` sends, bucket by bucket, into one worker's model.

    The first update goes through vLLM's own loader and proves the plan of copies in place. All
    later updates use that plan, and may bring only the worker's shard. If a model has no such plan,
    every update goes through vLLM's loader, which needs whole tensors. A connection may bring a
    LoRA adapter instead: then the model keeps its weights, and `use_adapter` ends the update.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _connection: Connection
    _receiver: WeightReceiver | None = None
    _plan: InPlacePlan | None = None
    """Set once it is proved."""
    _proof: PlanProof | None = None
    """Set until the end of the update that proves the plan."""
    _adapter: dict[str, torch.Tensor] | None = None
    """Set from the arrival of an adapter until it is used."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Read before any update, which gives a tied head a parameter of its own for a while.
        with without_adapters(self.model):
            names = {name for name, _ in loaded_parameters(self.model)}
            self._parameter_names = names - set(made_by_quantising(self.model))

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to this worker's endpoint, and leave the earlier one."""
        connection, rank = init_info.endpoints[self.parallel_config.rank]
        self._receiver = None  # frees its memory before the next one needs some
        self._receiver = WeightReceiver(connection, self.device, rank=rank)
        self._connection = connection
        if self._brings_adapter:
            return
        if connection.sends_shards:
            assert self._plan is not None
            self._plan.expect(connection.slices)
        else:
            self._begin_proof()

    def needed_slices(self) -> tuple[TensorSlice, ...] | None:
        """The slices that this worker needs; None for whole tensors: vLLM's loader, an adapter."""
        if self._brings_adapter or self._plan is None or self._plan.is_stale:
            return None
        return self._plan.needed()

    @property
    def _brings_adapter(self) -> bool:
        return self._connection.content == "adapter"

    def loads_in_place(self) -> bool:
        """Whether the next update is copied straight into the parameters; for tests."""
        return self._plan is not None

    def start_weight_update(self) -> None:
        """Prepare the model's layers for new weights."""
        if self._brings_adapter:
            return
        if self._plan is not None and self._plan.is_stale:
            if self._connection.sends_shards:
                raise WeightSyncError(
                    "parameters of the rollout engine have moved since they were mapped. Mapping "
                    "them again needs whole tensors, but this engine is sent shards: resume the "
                    "run from its checkpoint"
                )
            self._begin_proof()
        if self._plan is None:
            with without_adapters(self.model):
                initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load all buckets."""
        with out_of_memory_explained(
            "the weights that arrive beside what the rollout engine holds: lower "
            "weight_sync.bucket_mb or rollout.gpu_memory_utilization"
        ):
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

    @torch.no_grad()
    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive and load all buckets.

        Raises:
            WeightSyncError: a parameter got no weights, or weights are damaged or of another
                version.
        """
        assert self._receiver is not None
        version = update_info.policy_version
        if self._brings_adapter:
            self._adapter = {
                name: tensor
                for bucket, buffer in self._receiver.receive(version, keep=True)
                for name, tensor in bucket.views(buffer)
            }
        elif self._plan is not None:
            for bucket, buffer in self._receiver.receive(version, keep=False):
                self._plan.load(bucket, buffer)
            derive_again(self.model, self.model_config.dtype)
        else:
            with without_adapters(self.model):
                try:
                    self._receive_through_loader(self._receiver, version)
                except WeightSyncError:  # layers that got a part would keep it for the next update
                    finalize_layerwise_reload(self.model, self.model_config)
                    raise
        self._receiver.check()

    def finish_weight_update(self) -> None:
        """Put the new weights where the kernels read them."""
        if self._brings_adapter or self._plan is not None:
            return
        with without_adapters(self.model):
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                self._repack_for_cpu()
        if self._proof is not None:
            self._finish_proof(self._proof)

    def use_adapter(self) -> bool:
        """Sample with the adapter that the update brought; returns whether it brought one.

        It is the last step of an update: vLLM (0.32) drops all adapters in finish_weight_update.
        """
        if self._adapter is None:
            return False
        scaling = self._connection.adapter_scaling
        assert scaling is not None
        use_adapter(self.model, self._adapter, scaling=scaling)
        self._adapter = None
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return True

    def fill_padding(self) -> None:
        """Fill again what no weight sync brings of a parameter, after its memory was away."""
        if self._plan is not None:
            self._plan.fill_padding()

    def weights(self) -> list[torch.Tensor]:
        """The parameters that a weight sync brings."""
        with without_adapters(self.model):
            return [parameter.detach() for _, parameter in loaded_parameters(self.model)]

    def shutdown(self) -> None:
        """Nothing to release: the connection ends with the process."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Not used, but abstract in vLLM 0.26: the policy sends with `WeightSender`."""
        raise NotImplementedError

    def _receive_through_loader(self, receiver: WeightReceiver, version: int) -> None:
        loaded: set[str] = set()
        # vLLM keeps tensors until it has all parts of a layer, which several buckets may hold.
        for bucket, buffer in receiver.receive(version, keep=True):
            tensors = bucket.views(buffer)
            if self._proof is not None:
                self._proof.note(tensors)
            loaded |= self.model.load_weights(tensors)  # type: ignore[operator]
        missing = missing_parameters(self._parameter_names, loaded)
        if missing:
            raise WeightSyncError(
                f"the policy sent no weights for {len(missing)} parameters of the rollout engine: "
                f"{', '.join(missing[:8])}"
            )

    def _begin_proof(self) -> None:
        """Map the parameters, for the next update to prove it; warn if that is not possible."""
        self._plan = self._proof = None
        if not self._connection.in_place:
            return
        try:
            if self.vllm_config.quant_config is not None:
                raise CannotMap("the rollout engine quantises weights")
            if self.device.type == "cpu" and self._has_experts():
                raise CannotMap("kernels of experts read packed weights")
            copied = unreachable_copy(self.model)
            if copied is not None:
                raise CannotMap(f"latent attention reads {copied}, a copy of kv_b_proj")
            metadata = [piece.tensor for piece in self._connection.slices]
            with without_adapters(self.model):
                self._proof = PlanProof(InPlacePlan(self.model, metadata))
        except CannotMap as reason:
            self._warn_slow(str(reason))

    def _finish_proof(self, proof: PlanProof) -> None:
        self._proof = None
        difference = proof.first_difference()
        if difference is None:
            self._plan = proof.plan
        else:
            self._warn_slow(f"vLLM changes {difference} after loading it")

    def _warn_slow(self, reason: str) -> None:
        # On CPU every linear layer is packed, so there the warning would always come.
        if self.device.type != "cpu" and self.parallel_config.rank == 0:
            print(
                f"weight sync: {reason}; so every update goes through vLLM's own loader, which "
                "takes several times as long",
                flush=True,
            )

    def _has_experts(self) -> bool:
        return any(isinstance(module, RoutedExperts) for module in self.model.modules())

    def _repack_for_cpu(self) -> None:
        """Pack what CPU kernels read packed and a reload leaves unpacked: a tied head, experts.

        vLLM packs experts when it first loads them, and not when it updates them.
        """
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
            elif isinstance(module, RoutedExperts):
                kernel = module.quant_method.moe_kernel
                kernel.fused_experts.process_weights_after_loading(module)


class WeightSyncWorkerExtension:
    """Methods that `LLM.collective_rpc` finds on every worker."""

    weight_transfer_engine: BucketWeightTransferEngine
    model_runner: Any
    kept_memory: KeptMemory
    device: torch.device
    rank: int
    parallel_config: Any
    torch_trace: TorchTrace | None = None

    def keep_memory(self, *, weights_go: bool) -> None:
        """Copy what this worker must not forget while it sleeps."""
        engine = self.weight_transfer_engine
        self.kept_memory = KeptMemory(engine.weights() if weights_go else None)

    def restore_memory(self, tag: Tag) -> None:
        """Put back what was kept, once memory of this kind is awake."""
        self.kept_memory.restore(tag)
        if tag == "weights":
            self.weight_transfer_engine.fill_padding()

    def start_trace(self, operations: bool, memory: bool) -> None:
        """Record what this worker does, see TorchTrace."""
        device: Device = "cpu" if self.device.type == "cpu" else "cuda"
        self.torch_trace = TorchTrace(operations=operations, memory=memory, device=device)

    def stop_trace(self, folder: Path, name: str) -> Traced | None:
        """Write what this worker did; None if it was not recorded."""
        trace, self.torch_trace = self.torch_trace, None
        if trace is None:
            return None
        ranks = self.parallel_config.world_size
        label = f"worker {self.rank}" if ranks > 1 else ""
        return trace.stop(folder, f"{name}-{self.rank}" if ranks > 1 else name, label)

    def ask_weight_transfer(self, method: str) -> Any:
        """What a method of BucketWeightTransferEngine returns on this worker."""
        return getattr(self.weight_transfer_engine, method)()

    def sample_known_tokens_only(self, num_token_ids: int) -> None:
        """Give ids that decode to nothing no probability, as `Sampling.num_token_ids` does."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def mask_unknown_tokens(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = compute_logits(*args, **kwargs)
            if logits is not None:  # other tensor-parallel ranks have none
                logits[:, num_token_ids:] = -torch.inf
            return logits

        model.compute_logits = mask_unknown_tokens


WeightTransferEngineFactory.register_engine(BACKEND, BucketWeightTransferEngine)
leave_errors()
answer_for_stacks()
connect_cpu_runner()
