"""Adapters of random numbers, by rlsys's own table of names."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from rlsys.model.adapter_folder import write_adapter_config
from rlsys.model.lora import adapter_table, plan_lora
from rlsys.model.shape import read_model_shape


def save_random_adapter(model_folder, folder, lora):
    """Write an adapter whose B is not 0, as that of a new one is."""
    shape = read_model_shape(model_folder)
    plan = plan_lora(lora, shape)
    rng = torch.Generator().manual_seed(3)
    tensors = {
        name: 0.2 * torch.randn(size, generator=rng)
        for row in adapter_table(shape, plan)
        for name, size in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    write_adapter_config(folder, plan, str(model_folder))
