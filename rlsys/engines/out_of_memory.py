"""What to do when a GPU is full, told where it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def out_of_memory_explained(reason: str, *, memory: str = "The GPU") -> Iterator[None]:
    """Add to an error of full memory what it is too small for, and what to change.

    Args:
        reason: "<what>: <remedy>", to follow "The GPU is too small for".
        memory: of what there is too little; CUDA, which pins host memory, says the same of both.

    Raises:
        torch.OutOfMemoryError: the block ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        # What extensions run out of, Transformer Engine's among them, may come as its base class.
        if "out of memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(
            f"{error}\n{memory} is too small for {reason}; `rlsys explain` estimates what each "
            "would take"
        ) from error
