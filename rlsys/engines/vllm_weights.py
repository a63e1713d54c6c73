"""The receiving side of weight sync inside vLLM: a backend of its native weight transfer.

vLLM imports this module in every process that holds a part of the model, because
`WORKER_EXTENSION` names a class in it; that registers the backend. The life cycle is vLLM's:
init_weight_transfer_engine, then start_weight_update, update_weights, finish_weight_update for
every update.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rlsys.weight_sync.plan import TensorMeta
from rlsys.weight_sync.receiver import WeightReceiver
from rlsys.weight_sync.transport import WeightSyncError, make_transport

BACKEND = "rlsys"
WORKER_EXTENSION = "rlsys.engines.vllm_weights.WeightSyncWorkerExtension"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How this engine's workers meet the sender; plain values, since vLLM sends it as a dict."""

    transport: str
    address: str
    port: int
    first_rank: int
    """Rank of this engine's first worker in the weight sync group; the sender is rank 0."""
    world_size: int
    bucket_bytes: int
    verify: bool
    timeout_s: float
    metadata: list[tuple[str, str, tuple[int, ...]]]

    def as_request(self) -> dict[str, Any]:
        """The argument of `LLM.init_weight_transfer_engine`."""
        return {"init_info": asdict(self)}


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Nothing varies from update to update: the plan was agreed on at init."""


class BucketWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads what a `WeightSender` streams, bucket by bucket, into one worker's model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    receiver: WeightReceiver

    def __init__(self, *args: Any):
        super().__init__(*args)
        # Taken before any update, which gives a tied head a parameter of its own for a while.
        self._parameter_names = {name for name, _ in self.model.named_parameters()}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the weight sync group."""
        self.receiver = WeightReceiver(
            [TensorMeta(name, dtype, tuple(shape)) for name, dtype, shape in init_info.metadata],
            transport=make_transport(init_info.transport, self.device),
            bucket_bytes=init_info.bucket_bytes,
            verify=init_info.verify,
        )
        self.receiver.connect(
            init_info.address,
            init_info.port,
            rank=init_info.first_rank + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Make the model's layers wait for new weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load all buckets."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive and load all buckets; raises where a parameter got nothing."""
        loaded: set[str] = set()
        for tensors in self.receiver.receive():
            loaded |= self.model.load_weights(tensors)  # type: ignore[operator]
        missing = sorted(self._parameter_names - loaded)
        if missing:
            raise WeightSyncError(
                f"the policy sent no weights for {len(missing)} parameters of the rollout engine: "
                f"{', '.join(missing[:8])}"
            )

    def finish_weight_update(self) -> None:
        """Put the new weights where the kernels read them."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_output_head()

    def _repack_output_head(self) -> None:
        """CPU kernels read a packed copy, which a reload leaves stale when the head is tied."""
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release: the group ends with the process."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM 0.26, gone later; the policy sends with `WeightSender` instead."""
        raise NotImplementedError


class WeightSyncWorkerExtension:
    """Methods that `LLM.collective_rpc` finds on every worker."""

    weight_transfer_engine: BucketWeightTransferEngine

    def received_checksums(self) -> list[int]:
        """Per bucket of the last update."""
        return self.weight_transfer_engine.receiver.checksums


WeightTransferEngineFactory.register_engine(BACKEND, BucketWeightTransferEngine)
