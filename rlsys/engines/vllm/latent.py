"""Latent attention in vLLM: decoding reads matrices that are made from loaded weights.

After loading, vLLM cuts kv_b_proj into W_UK_T and W_UV. vLLM 0.32 makes parameters of both, which
no checkpoint has; older versions make tensors, which may be views of kv_b_proj. When weights change
in place, whatever is a copy has to be made again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_DERIVED = ("W_UK_T", "W_UV")


def loaded_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that are loaded from checkpoints, by name."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] not in _DERIVED:
            yield name, parameter


def unreachable_copy(model: torch.nn.Module) -> str | None:
    """A copy of kv_b_proj that would be stale after changes in place; None if all can follow.

    vLLM would put it to another place when it makes it again, and CUDA graphs read the old place.
    """
    for attention in _latent_attentions(model):
        for name in _DERIVED:
            if name not in attention._parameters and not _is_view(attention, name):
                return name
    return None


def derive_again(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make the parameters again that are made from loaded weights, where they are."""
    for attention in _latent_attentions(model):
        if _DERIVED[0] in attention._parameters:
            attention.process_weights_after_loading(dtype)  # type: ignore[operator]


def _latent_attentions(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in model.modules() if hasattr(module, _DERIVED[0]))


def _is_view(attention: torch.nn.Module, name: str) -> bool:
    weight, derived = attention.kv_b_proj.weight, getattr(attention, name)  # type: ignore[union-attr]
    return bool(derived.untyped_storage()._cdata == weight.untyped_storage()._cdata)
