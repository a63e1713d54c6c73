"""Many copies between tensors that stay in place: planned once, repeated with a few kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

MAX_PIECES = 64
"""Most contiguous pieces to cut a copy into; one kernel with strides is cheaper than more."""


class CopyPlan:
    """Copies of many tensors, which `run` repeats whenever the sources have changed.

    On a GPU one kernel copies many contiguous tensors, so a tensor that consists of a few
    contiguous pieces is cut into them.

    Args:
        pairs: (target, source) of equal shapes; the target's type holds every value of the
            source's. The plan keeps both, and with them the memory that they are views of.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]):
        self._together: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._alone: list[tuple[torch.Tensor, torch.Tensor]] = []
        for whole_target, whole_source in pairs:
            assert holds_exactly(whole_target.dtype, whole_source.dtype), whole_source.dtype
            assert whole_target.shape == whole_source.shape, (whole_target, whole_source)
            for target, source in _pieces(whole_target, whole_source):
                contiguous = target.is_contiguous() and source.is_contiguous()
                alike = target.device == source.device and target.dtype == source.dtype
                if contiguous and alike:
                    targets, sources = self._together.setdefault(target.dtype, ([], []))
                    targets.append(target.view(-1))
                    sources.append(source.view(-1))
                else:
                    self._alone.append((target, source))

    @torch.no_grad()
    def run(self) -> None:
        """Copy; on a GPU in the current stream."""
        for targets, sources in self._together.values():
            torch._foreach_copy_(targets, sources)
        for target, source in self._alone:
            target.copy_(source)


def holds_exactly(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether numbers of type `source` stay what they are as type `target`."""
    return torch.promote_types(target, source) == target


def _pieces(
    target: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    both = target, source
    if all(tensor.is_contiguous() for tensor in both) or not 1 < len(target) <= MAX_PIECES:
        yield both
    elif all(tensor[0].is_contiguous() for tensor in both):
        yield from zip(target, source, strict=True)
    else:
        yield both
