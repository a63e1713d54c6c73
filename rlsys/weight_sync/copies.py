"""Many copies between tensors that stay where they are, planned once and done by few kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

MAX_PIECES = 64
"""A copy is cut into at most so many that are contiguous on both sides; beyond that one kernel that
follows the strides is cheaper."""


class CopyPlan:
    """Copies of many tensors, for `run` to repeat whenever the sources have changed.

    On a GPU one kernel copies many tensors, if all are contiguous: so what can be cut into few
    contiguous pieces is.

    Args:
        pairs: (target, source) of equal shapes and types. Both are kept, and with them the memory
            that they are views of.
    """

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]):
        self._together: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._alone: list[tuple[torch.Tensor, torch.Tensor]] = []
        for whole_target, whole_source in pairs:
            assert whole_target.dtype == whole_source.dtype, (whole_target, whole_source)
            assert whole_target.shape == whole_source.shape, (whole_target, whole_source)
            for target, source in _pieces(whole_target, whole_source):
                contiguous = target.is_contiguous() and source.is_contiguous()
                if contiguous and target.device == source.device:
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
