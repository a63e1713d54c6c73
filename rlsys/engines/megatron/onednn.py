"""Matrix products in float32 on the CPU by oneDNN, where torch would ask MKL.

MKL uses a processor's AVX-512 units only if Intel made it. oneDNN asks the processor what it has:
on an AMD EPYC (Zen 5), products of 576 to 3,072 columns take half the time. torch has both, and
takes oneDNN for narrower types only.
"""

from __future__ import annotations

import warnings

import torch

FEWEST_PRODUCTS = 2**26
"""Multiplications from which on one product saves more than oneDNN takes to write a kernel for its
sizes, about 1 ms; the lengths of packed batches seldom repeat."""

_registered: list[torch.library.Library] = []
"""What is registered holds as long as its library."""


def use_onednn() -> None:
    """Compute the large float32 products of this process by oneDNN, where this torch has both."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if _registered or not has_both:
        return
    otherwise = torch.library.get_kernel("aten::mm", "CPU")

    def mm(keys: torch.DispatchKeySet, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and left.numel() * right.shape[1] >= FEWEST_PRODUCTS:
            return _product(left, right)
        return otherwise.call_boxed(keys, left, right)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the kernel replaces another one
        library.impl("mm", mm, "CPU", with_keyset=True)
    _registered.append(library)


def _product(left_MK: torch.Tensor, right_KN: torch.Tensor) -> torch.Tensor:
    """[M, N]; `right` is read where it is if it or its transpose is contiguous."""
    weight_NK = right_KN.t()
    if not right_KN.is_contiguous():
        weight_NK = weight_NK.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left_MK, weight_NK, None, "none", [], "")
