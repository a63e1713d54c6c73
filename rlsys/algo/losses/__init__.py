"""Policy losses by name; `base` says how to write one of your own."""

from rlsys.algo.losses import clipped, others
from rlsys.algo.losses.base import LossInput, losses, policy_loss, register_loss

__all__ = ["LossInput", "clipped", "losses", "others", "policy_loss", "register_loss"]
