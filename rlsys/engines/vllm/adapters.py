"""The policy's LoRA adapter in one vLLM worker: its tensors go straight into vLLM's own slot.

vLLM reads adapters from folders. Here they come from a weight sync, always under one id, so that a
request keeps its adapter while the weights change. vLLM wraps each layer that an adapter may
change, which gives the layer's own parameters other names. So whoever loads base weights looks at
the model `without_adapters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from rlsys.weight_sync.transport import WeightSyncError

ADAPTER_ID = 1


def adapter_request() -> LoRARequest:
    """What every request of a policy with an adapter carries.

    vLLM would read the path only if the slot were empty, and then fails instead of sampling with
    the base.
    """
    return LoRARequest("policy", ADAPTER_ID, "the policy's adapter, which no weight sync brought")


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Within this context `model` has its own layers in place of vLLM's wrappers around them."""
    wrapped = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, BaseLayerWithLoRA)
    ]
    for parent, name, layer in wrapped:
        parent._modules[name] = layer.base_layer
    try:
        yield
    finally:
        for parent, name, layer in wrapped:
            parent._modules[name] = layer


def use_adapter(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, scaling: float
) -> None:
    """Put an adapter into the model's slot, in place of the one before.

    Args:
        model: vLLM's, of an engine that was started for adapters.
        tensors: lora_A and lora_B of each module under PEFT's names; vLLM scales them in place.
        scaling: factor of B A, as alpha / rank.

    Raises:
        WeightSyncError: the model has no layer of that name, so vLLM would ignore the tensors.
    """
    manager: Any = model.lora_manager
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    adapter = LoRAModel.from_lora_tensors(
        lora_model_id=ADAPTER_ID,
        tensors=dict(tensors),
        peft_helper=PEFTHelper(r=rank, lora_alpha=scaling * rank, target_modules=[]),  # type: ignore[arg-type]
        device=str(manager.device),
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=_mapper_of_names(model),
    )
    known = {
        *manager.modules,
        *(name for names in manager.packed_modules.values() for name in names),
    }
    unknown = sorted(adapter.loras.keys() - known)
    if unknown:
        raise WeightSyncError(
            f"vLLM takes no adapter for {len(unknown)} modules, such as {unknown[0]}: set "
            "weight_sync.lora to merged"
        )
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER_ID)


def _mapper_of_names(model: torch.nn.Module) -> Any:
    """vLLM's names of modules; without its stacking of layers, which wrappers know themselves."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    if hasattr(mapper, "get_rename_mapper"):
        return mapper.get_rename_mapper()
    return mapper.get_unstacked_mapper()  # its name in vLLM 0.26
