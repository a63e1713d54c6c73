"""Losses by name; `base` says how to write a policy loss of your own."""

from torch import Tensor

from rlsys.algo.losses import clipped, others
from rlsys.algo.losses.base import LossInput, losses, policy_loss, register_loss
from rlsys.algo.losses.distillation import gkd_loss
from rlsys.algo.losses.preference import preference_loss
from rlsys.config import GrpoConfig, PreferenceAlgorithm
from rlsys.config.algorithm import GKD

__all__ = [
    "LossInput",
    "clipped",
    "compute_loss",
    "gkd_loss",
    "losses",
    "others",
    "policy_loss",
    "preference_loss",
    "register_loss",
]


def compute_loss(inputs: LossInput, config: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and statistics of a micro-batch, by the loss that `config` names."""
    if isinstance(config, PreferenceAlgorithm):
        return preference_loss(inputs, config)
    if config.loss_type == GKD:
        return gkd_loss(inputs)
    return losses[config.loss_type](inputs, config)
