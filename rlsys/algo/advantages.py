"""Group-relative advantages: what makes it GRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.types import RolloutGroup

ADVANTAGE_EPS = 1e-4
"""Added to the std, in reward units, as TRL and ms-swift do: equal rewards give 0, not nan."""


def rewards_matrix(groups: list[RolloutGroup]) -> Tensor:
    """Total rewards of scored groups, [P, G] float64.

    Example:
        two prompts with rewards 1, 0 and 0.5, 0.5 -> [[1, 0], [0.5, 0.5]]
    """
    return torch.tensor(
        [[reward.total for reward in group.rewards] for group in groups], dtype=torch.float64
    )


def group_relative_advantages(
    rewards_PG: Tensor, *, scale_rewards: Literal["group", "batch", "none"]
) -> Tensor:
    """How much better each completion is than its siblings, [P, G] float32.

    `A[p, g] = (r[p, g] - mean(r[p])) / (std + ADVANTAGE_EPS)`, DeepSeekMath (arXiv:2402.03300),
    section 4.1.2, with torch's unbiased std. The std is taken

    - "group": over the G rewards of the prompt;
    - "batch": over all P * G rewards: a group whose rewards hardly differ is not blown up;
    - "none": not at all (the division is left out), Dr. GRPO (arXiv:2503.20783), section 3.2.

    Args:
        rewards_PG: [P, G] total rewards, any float type; computed in float64.
        scale_rewards: as in `GrpoConfig`.

    Raises:
        ValueError: G = 1, because a completion alone has nothing to be compared with.
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"advantages compare the completions of one prompt, but a group has "
            f"{rewards_PG.shape[1]}: set rollout.num_generations to at least 2"
        )
    rewards_PG = rewards_PG.double()
    advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + ADVANTAGE_EPS)
    elif scale_rewards == "batch":
        advantages_PG = advantages_PG / (rewards_PG.std() + ADVANTAGE_EPS)
    return advantages_PG.float()
