"""What of a model is trained: all weights, some of them, or adapters beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from rlsys.config import RunConfig
from rlsys.config.dataset_spec import split_hub
from rlsys.engines.megatron.freezing import freeze, lead_gradients_to
from rlsys.engines.megatron.lora import Adapters
from rlsys.engines.megatron.weights import MegatronWeights
from rlsys.model.freezing import frozen_tensors, num_frozen, trained_text
from rlsys.model.lora import count_trained, plan_lora
from rlsys.model.shape import ModelShape

if TYPE_CHECKING:
    from rlsys.engines.megatron.bridge import BridgedWeights


def choose_trained(
    config: RunConfig,
    model: torch.nn.ModuleList,
    weights: MegatronWeights | BridgedWeights,
    shape: ModelShape,
) -> Adapters | None:
    """Freeze what is not trained, and put adapters on the model where policy.lora says so."""
    policy = config.policy
    if policy.lora is None and not policy.freezes:
        return None
    assert isinstance(weights, MegatronWeights), "see preflight"
    lead_gradients_to(model)
    if policy.lora is None:
        freeze(weights, frozen_tensors(policy, shape))
        num_trained = shape.num_params - num_frozen(policy, shape)
        adapters = None
    else:
        plan = plan_lora(policy.lora, shape)
        adapters = Adapters(model, weights, shape, plan, seed=config.seed)
        num_trained = count_trained(adapters.weights.table)
    if dist.get_rank() == 0:
        print(trained_text(num_trained, shape.num_params), flush=True)
    return adapters


def trained_weights(model: torch.nn.ModuleList) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a rank's chunks that are trained, by megatron-core's names."""
    for chunk in model:
        yield from (both for both in chunk.named_parameters() if both[1].requires_grad)


def base_name(config: RunConfig, folder: Path) -> str:
    """The base model as adapter_config.json names it: a hub id, or an absolute path.

    Args:
        config: names the model.
        folder: where it is on this machine.
    """
    hub, name = split_hub(config.model.path)
    is_here = hub == "modelscope" or Path(config.model.path).is_dir()
    return str(folder.resolve()) if is_here else name
