"""The receiving side of weight sync inside vLLM: a backend of its native weight transfer.

vLLM imports this module in every process that holds a part of the model, because
`WORKER_EXTENSION` names a class in it; that registers the backend, and lets a worker tell why it
could not start. The life cycle is vLLM's:
init_weight_transfer_engine, then start_weight_update, update_weights, finish_weight_update for
every update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from rlsys.engines.vllm.in_place import CannotMap, HeldSlice, InPlacePlan, PlanProof
from rlsys.engines.vllm.names import not_loaded
from rlsys.engines.vllm.worker_errors import leave_errors
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.plan import TensorSlice
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.transport import WeightSyncError

BACKEND = "rlsys"
WORKER_EXTENSION = "rlsys.engines.vllm.weight_backend.WeightSyncWorkerExtension"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How this engine's workers meet the sender."""

    connection: Connection
    first_rank: int
    """Rank of this engine's first worker in its weight sync group."""
    group: int
    """Which of the connection's groups that is."""

    def as_request(self) -> dict[str, Any]:
        """The argument of `LLM.init_weight_transfer_engine`, which wants a dict of the fields."""
        return {"init_info": dict(vars(self))}


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """What varies from update to update: the rest was agreed on when the sides connected."""

    policy_version: int
    """Of the weights that are to come."""


class BucketWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what a `WeightSender` streams, bucket by bucket, into one worker's model.

    The first update goes through vLLM's own loader and proves the plan for copies in place, which
    all later ones use. A worker of several is then sent no more than it holds. Where there is no
    such plan every update goes through vLLM's loader, which takes whole tensors.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    receiver: WeightReceiver

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Taken before any update, which gives a tied head a parameter of its own for a while.
        self._parameter_names = {name for name, _ in self.model.named_parameters()}
        self._plan: InPlacePlan | None = None
        self._proof: PlanProof | None = None
        self._gets_its_shard = False

    @property
    def loads_in_place(self) -> bool:
        """Whether the next update is copied straight into the parameters."""
        return self._plan is not None

    def held_slices(self) -> list[HeldSlice]:
        """What this worker's parameters hold of each tensor, where they are loaded in place."""
        assert self._plan is not None
        return self._plan.held()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join this engine's weight sync group."""
        connection = init_info.connection
        rank = init_info.first_rank + self.parallel_config.rank
        self.receiver = WeightReceiver(connection, self.device, rank=rank, group=init_info.group)
        self._metadata = [piece.of for piece in connection.slices]
        self._plan = self._proof = None
        self._gets_its_shard = False
        if connection.in_place:
            self._begin_proof()

    def needed_slices(self) -> tuple[TensorSlice, ...] | None:
        """What has to be sent to this worker; None where vLLM's loader needs whole tensors."""
        return None if self._plan is None or self._plan.is_stale else self._plan.needed()

    def connect_shard(self, connections: Sequence[Connection], rank: int) -> None:
        """Leave the weight sync group for one that gets what this worker holds, and no more.

        Args:
            connections: of the workers of an engine, in their order.
            rank: in the group.
        """
        assert self._plan is not None
        connection = connections[self.parallel_config.rank]
        del self.receiver  # and its memory, before there is another one's
        self.receiver = WeightReceiver(connection, self.device, rank=rank)
        self._plan.expect(connection.slices)
        self._gets_its_shard = True

    def _begin_proof(self) -> None:
        try:
            if self.vllm_config.quant_config is not None:
                raise CannotMap("the rollout engine quantises weights")
            if self.device.type == "cpu" and self._has_experts():
                raise CannotMap("kernels of experts read packed weights")
            self._proof = PlanProof(InPlacePlan(self.model, self._metadata))
        except CannotMap as reason:
            self._tell_reload(str(reason))

    def _has_experts(self) -> bool:
        return any(isinstance(module, RoutedExperts) for module in self.model.modules())

    def _tell_reload(self, reason: str) -> None:
        # On CPU every linear layer is packed, so there it says nothing.
        if self.device.type != "cpu" and self.parallel_config.rank == 0:
            print(
                f"weight sync: {reason}; so every update goes through vLLM's own loader, which "
                "takes several times as long",
                flush=True,
            )

    def start_weight_update(self) -> None:
        """Make the model's layers wait for new weights."""
        if self._plan is not None and self._plan.is_stale:
            if self._gets_its_shard:
                raise WeightSyncError(
                    "parameters of the rollout engine lie elsewhere than before, so its loader has "
                    "to find them, and that takes whole tensors, which are not sent any more: "
                    "resume the run from its checkpoint"
                )
            self._plan = None
            self._begin_proof()
        if self._plan is None:
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
            WeightSyncError: a parameter got nothing, or weights are damaged, or another version's.
        """
        version = update_info.policy_version
        if self._plan is not None:
            for bucket, buffer in self.receiver.receive(version, keep=False):
                self._plan.load(bucket, buffer)
        else:
            self._receive_through_loader(version)
        self.receiver.check()

    def _receive_through_loader(self, version: int) -> None:
        loaded: set[str] = set()
        # vLLM keeps tensors until it has all parts of a layer, which several buckets may hold.
        for bucket, buffer in self.receiver.receive(version, keep=True):
            tensors = bucket.views(buffer)
            if self._proof is not None:
                self._proof.note(tensors)
            loaded |= self.model.load_weights(tensors)  # type: ignore[operator]
        missing = not_loaded(self._parameter_names, loaded)
        if missing:
            raise WeightSyncError(
                f"the policy sent no weights for {len(missing)} parameters of the rollout engine: "
                f"{', '.join(missing[:8])}"
            )

    def finish_weight_update(self) -> None:
        """Put the new weights where the kernels read them."""
        if self._plan is not None:
            return
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_for_cpu()
        if self._proof is not None:
            self._finish_proof(self._proof)

    def _finish_proof(self, proof: PlanProof) -> None:
        self._proof = None
        difference = proof.first_difference()
        if difference is None:
            self._plan = proof.plan
        else:
            self._tell_reload(f"vLLM changes {difference} after loading it")

    def _repack_for_cpu(self) -> None:
        """What CPU kernels read packed and a reload leaves as it is: a tied head, experts.

        vLLM's update of experts leaves out the packing with which it ends their first loading.
        """
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
            elif isinstance(module, RoutedExperts):
                kernel = module.quant_method.moe_kernel
                kernel.fused_experts.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release: the group ends with the process."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM 0.26, gone later; the policy sends with `WeightSender` instead."""
        raise NotImplementedError


class WeightSyncWorkerExtension:
    """Methods that `LLM.collective_rpc` finds on every worker."""

    weight_transfer_engine: BucketWeightTransferEngine

    model_runner: Any

    def sample_known_tokens_only(self, num_token_ids: int) -> None:
        """Give ids that decode to nothing no probability, as `SamplingSupport` does."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def of_known_tokens(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = compute_logits(*args, **kwargs)
            if logits is not None:  # other tensor-parallel ranks have none
                logits[:, num_token_ids:] = -torch.inf
            return logits

        model.compute_logits = of_known_tokens

    def loads_in_place(self) -> bool:
        """Whether the next update is copied straight into the parameters."""
        return self.weight_transfer_engine.loads_in_place

    def needed_slices(self) -> tuple[TensorSlice, ...] | None:
        """See BucketWeightTransferEngine.needed_slices."""
        return self.weight_transfer_engine.needed_slices()

    def connect_shard(self, connections: Sequence[Connection], rank: int) -> None:
        """See BucketWeightTransferEngine.connect_shard."""
        self.weight_transfer_engine.connect_shard(connections, rank)

    def held_slices(self) -> list[HeldSlice]:
        """What this worker's parameters hold of each tensor, to compare with the policy's."""
        return self.weight_transfer_engine.held_slices()


WeightTransferEngineFactory.register_engine(BACKEND, BucketWeightTransferEngine)
leave_errors()
