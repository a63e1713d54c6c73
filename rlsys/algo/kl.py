"""Estimates of KL(p || q) from the log-probs of samples of p.

Schulman, http://joschu.net/blog/kl-approx.html, with `x = log q - log p` for each token. Over
samples of p, the mean of k1 and k3 is the KL, that of k2 nearly; k2 and k3 are never negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of log ratios in nats, both ways. exp(20) is 5e8, far beyond any clip range but finite;
exp(89) is inf in float32, and the gradient of a branch that clipping discards would be 0 * inf =
nan."""


def k1(log_ratio: Tensor) -> Tensor:
    """`-x`: unbiased, of either sign, noisy."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """`x ** 2 / 2`: a little biased, but the mean of its gradient is the KL's gradient."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """`exp(x) - x - 1`: unbiased, never negative, 0 when p and q agree.

    DeepSeekMath (arXiv:2402.03300), equation 4, with q the reference model and p the policy.
    """
    # expm1 keeps what exp() - 1 rounds away when policy and reference nearly agree.
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """`numerator - denominator`, bounded by MAX_LOG_RATIO, and 0 with gradient 0 where masked."""
    return (numerator - denominator).masked_fill(~mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
