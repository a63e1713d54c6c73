"""Out-of-memory errors that say what does not fit and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def out_of_memory_explained(reason: str, *, memory: str = "The GPU") -> Iterator[None]:
    """Add to an out-of-memory error what does not fit, and what to change.

    Args:
        reason: "<what>: <remedy>", which follows "The GPU is too small for".
        memory: the memory that is full; CUDA, which pins host memory, has one message for both.

    Raises:
        torch.OutOfMemoryError: the block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        # Extensions such as Transformer Engine's may raise the base class.
        if "out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            f"{error}\n{memory} is too small for {reason}; `rlsys explain` estimates what each "
            "would take"
        ) from error
