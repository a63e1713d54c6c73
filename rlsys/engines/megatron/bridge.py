"""Models that mcore-bridge builds, behind the interface of MegatronWeights.

mcore-bridge patches transformers, peft and megatron-core when it is imported. So only processes of
such a model import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from transformers import PretrainedConfig

from rlsys.config import PolicyConfig
from rlsys.engines.megatron.options import megatron_config
from rlsys.model.families.base import HF_OUTPUT
from rlsys.model.folder_check import some
from rlsys.model.weight_files import read_header, weight_files
from rlsys.weight_sync.plan import TensorMeta


def bridged_config(hf: PretrainedConfig, options: dict[str, Any], policy: PolicyConfig) -> Any:
    """mcore-bridge's config of a model, a TransformerConfig with more fields.

    Args:
        hf: transformers' config, read from a folder.
        options: of the run, not of the model.
        policy: its megatron_kwargs are passed on.

    Raises:
        ValueError: mcore-bridge does not know the model, or trains more than its text.
    """
    from mcore_bridge import ModelConfig, hf_to_mcore_config
    from mcore_bridge.model import get_mcore_model_type, get_model_meta

    known = get_mcore_model_type(hf.model_type)
    if known is None:
        raise ValueError(
            f"{hf.name_or_path}: neither rlsys nor mcore-bridge knows model_type "
            f"{hf.model_type!r}: use another model"
        )
    if get_model_meta(known).is_multimodal:
        raise ValueError(
            f"{hf.name_or_path}: model_type {hf.model_type!r} is multimodal, and rlsys trains "
            "models of text: use another model"
        )
    of_model = hf_to_mcore_config(hf)
    # No loss balances the experts, and a bias of the router that was trained with one stays.
    balance = {"moe_router_load_balancing_type": "none", "moe_router_bias_update_rate": 0.0}
    return megatron_config(ModelConfig, of_model | balance | options, policy)


def build_bridged_model(config: Any) -> torch.nn.Module:
    """This rank's GPTModel of a `bridged_config`, without weights."""
    from mcore_bridge import get_mcore_model

    (model,) = get_mcore_model(config)
    return model


class BridgedWeights:
    """The weights of one rank's part of a model that mcore-bridge built.

    Args:
        model: the bare model of this rank.
        config: the model's `bridged_config`.
    """

    def __init__(self, model: torch.nn.Module, config: Any):
        self._model, self._bridge = model, config.bridge
        for name, parameter in model.named_parameters():
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                _mark_rows_as_cut(parameter)
        self._metadata: list[TensorMeta] = []
        self._stored: set[str] = set()
        """Names in the model folder."""

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read this rank's part of a model folder; says which tensors stay behind.

        Raises:
            ValueError: the folder lacks tensors of the model.
        """
        self._stored = {name for file in weight_files(folder) for name in read_header(file)}
        self._bridge.load_weights([self._model], str(folder))
        self._metadata = [
            TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self.export()
        ]
        names = {meta.name for meta in self._metadata}
        missing, unused = sorted(names - self._stored), sorted(self._stored - names - {HF_OUTPUT})
        if missing:
            raise ValueError(
                f"{folder} lacks {some(missing)}, which the model has that mcore-bridge builds by "
                "its config.json: use another checkpoint, or another version of mcore-bridge"
            )
        if unused and dist.get_rank() == 0:
            print(
                f"note: {folder} holds {some(unused)}, which mcore-bridge leaves out: they are not "
                "trained, and not in what the run saves",
                flush=True,
            )

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every Hugging Face tensor, in the order of `export`."""
        return self._metadata

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole Hugging Face tensors, in order, on every rank; all ranks must iterate."""
        gate = torch.empty(0)
        for name, tensor in self._bridge.export_weights([self._model]):
            module, _, part = name.rpartition(".mlp.")
            fused = f"{module}.mlp.gate_up_proj.weight"
            # mcore-bridge gives a dense MLP's gate and up apart, however the model folder has them.
            if fused not in self._stored or not part.startswith(("gate_proj.", "up_proj.")):
                yield name, tensor
            elif part.startswith("gate_proj."):
                gate = tensor
            else:
                yield fused, torch.cat([gate, tensor])

    def mix(self, tensors: Iterator[tuple[str, torch.Tensor]], *, alpha: float) -> None:
        """Refused before the start: see `bridge_problem`."""
        raise AssertionError("mcore-bridge has no weights in and out one tensor at a time")

    @property
    def sharding(self) -> dict[str, Any]:
        """See MegatronWeights; layers may differ."""
        return {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": True,
        }

    def sharded_state(self) -> dict[str, Any]:
        """This rank's parameters with their places in the whole model, for dist_checkpointing."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return self._model.sharded_state_dict(metadata=self.sharding | {"dp_cp_group": group})

    def load_extra(self, state: dict[str, Any]) -> None:
        """Take what layers hold besides parameters, by the names of `sharded_state`."""
        self._model.load_state_dict(state, strict=False)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self._model.parameters()).device


def _mark_rows_as_cut(parameter: torch.nn.Parameter) -> None:
    # megatron-core's initialisation marks them, and it is skipped: see MegatronWeights.
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
