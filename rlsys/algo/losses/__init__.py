"""Policy losses, by name, and what they report; `base` says how to write one of your own."""

from rlsys.algo.losses import clipped, others
from rlsys.algo.losses.base import (
    LossFunction,
    LossInput,
    losses,
    policy_loss,
    register_loss,
    token_statistics,
    weighted_sum,
)

__all__ = [
    "LossFunction",
    "LossInput",
    "clipped",
    "losses",
    "others",
    "policy_loss",
    "register_loss",
    "token_statistics",
    "weighted_sum",
]
