"""How much each token counts: what is left out, and the denominators of an optimizer step.

All of it is decided from the whole optimizer step, before it is split over ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig
    from rlsys.config.algorithm import Aggregation
    from rlsys.types import RolloutGroup, TrainBatch


def leave_out(
    batch: TrainBatch, groups: list[RolloutGroup], *, mask_truncated_completions: bool
) -> None:
    """Takes completions out of the loss, in place.

    A completion without a reward (NaN) is dropped: it is no longer `kept`. With
    `mask_truncated_completions` one that was cut at the length limit loses its tokens but still
    counts as a completion, as in TRL; DAPO (arXiv:2503.14476), section 3.4, overlong filtering.

    Args:
        batch: N rows, built from `groups`, whose advantages are known: they are comparisons with
            all completions, those left out here among them.
        groups: P scored groups of G completions.
        mask_truncated_completions: as in `GrpoConfig`.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    completions = [completion for group in groups for completion in group.completions]
    batch.kept = torch.tensor([not math.isnan(reward.total) for reward in rewards])
    trained_N = batch.kept
    if mask_truncated_completions:
        trained_N = trained_N & torch.tensor([c.finish_reason != "length" for c in completions])
    batch.completion_mask &= trained_N[:, None]
    for values_NS in (
        batch.advantages,
        batch.rollout_logprobs,
        batch.ref_logprobs,
        batch.old_logprobs,
    ):
        if values_NS is not None:
            values_NS.masked_fill_(~batch.completion_mask, 0.0)


def loss_weights(
    completion_mask_NS: Tensor,
    *,
    aggregation: Aggregation,
    max_completion_length: int,
    rows: Sequence[int] | None = None,
    kept_N: Tensor | None = None,
) -> Tensor:
    """The weight of each token, so that `loss = sum(weights * token_losses)`, [N, S] float32.

    With M completions in the optimizer step, `len_n` tokens in completion n:

    - seq_mean_token_mean: `1 / (M * len_n)`, DeepSeekMath (arXiv:2402.03300), equation 3;
    - token_mean: `1 / sum(len_n)`, DAPO (arXiv:2503.14476), section 3.3;
    - seq_mean_token_sum: `1 / M`, the log-prob of whole completions, RLOO (arXiv:2402.14740);
    - seq_mean_token_sum_norm: `1 / (M * max_completion_length)`, Dr. GRPO (arXiv:2503.20783),
      section 3.2.

    A completion without tokens counts in M and contributes 0; one that is not kept does not count.

    Args:
        completion_mask_NS: [N, S] bool.
        aggregation: one of these.
        max_completion_length: of the rollout; only seq_mean_token_sum_norm reads it.
        rows: the completions of this optimizer step, None for all N. Other rows get weight 0.
        kept_N: [N] bool, `TrainBatch.kept`.
    """
    counts_N = torch.zeros(len(completion_mask_NS), dtype=torch.float64)
    counts_N[slice(None) if rows is None else list(rows)] = 1.0
    if kept_N is not None:
        counts_N *= kept_N
    mask_NS = completion_mask_NS * counts_N[:, None]
    num_completions = counts_N.sum().clamp(min=1)
    if aggregation == "seq_mean_token_mean":
        weights_NS = mask_NS / (mask_NS.sum(dim=1, keepdim=True).clamp(min=1) * num_completions)
    elif aggregation == "token_mean":
        weights_NS = mask_NS / mask_NS.sum().clamp(min=1)
    elif aggregation == "seq_mean_token_sum":
        weights_NS = mask_NS / num_completions
    else:
        weights_NS = mask_NS / (num_completions * max_completion_length)
    return weights_NS.float()


def keep_high_entropy(
    advantages_NS: Tensor,
    entropies_NS: Tensor,
    completion_mask_NS: Tensor,
    *,
    rows: Sequence[int],
    quantile: float,
) -> Tensor:
    """Advantages of the tokens of highest entropy, 0 for the others, [N, S].

    arXiv:2506.01939, equation 5: the share `quantile` of the tokens of `rows` that the policy was
    least sure of. A token of advantage 0 has no policy gradient, but still counts in denominators,
    in the KL and in the entropy bonus. Entropies are those before the update, and the threshold
    that of the whole optimizer step: so it does not depend on how the step is split.

    Args:
        advantages_NS: [N, S].
        entropies_NS: [N, S], in nats.
        completion_mask_NS: [N, S] bool.
        rows: the completions of the optimizer step.
        quantile: share of their tokens, in (0, 1].
    """
    in_step = entropies_NS[list(rows)][completion_mask_NS[list(rows)]]
    if len(in_step) == 0:
        return advantages_NS
    # Not torch.quantile, which refuses more than 16 million values: linear interpolation, too.
    position = (1 - quantile) * (len(in_step) - 1)
    ordered = in_step.double().sort().values
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    threshold = below + (above - below) * (position - math.floor(position))
    return advantages_NS.masked_fill(entropies_NS.double() < threshold, 0.0)


def tokens_of_high_covariance(
    advantages_NS: Tensor,
    logprobs_NS: Tensor,
    completion_mask_NS: Tensor,
    config: GrpoConfig,
    *,
    loss: str,
    rows: Sequence[int],
    seed: int,
) -> Tensor:
    """The tokens that clip_cov or kl_cov treats apart, [N, S] bool.

    `cov_t = (A_t - mean A) (log pi_t - mean log pi)` (arXiv:2505.22617): what
    drives the entropy down. Means are over the tokens of the optimizer step, and log-probs those
    before the update: so the choice does not depend on how the step is split.

    Args:
        advantages_NS: [N, S].
        logprobs_NS: [N, S].
        completion_mask_NS: [N, S] bool.
        config: has the shares and bounds.
        loss: clip_cov draws `clip_cov_ratio` of the tokens from those between `clip_cov_lb` and
            `clip_cov_ub`; kl_cov takes the highest `kl_cov_ratio`.
        rows: the completions of the optimizer step.
        seed: of the draw.
    """
    in_step_NS = torch.zeros_like(completion_mask_NS)
    in_step_NS[list(rows)] = completion_mask_NS[list(rows)]
    chosen_NS = torch.zeros_like(in_step_NS)
    advantages, logprobs = advantages_NS[in_step_NS].double(), logprobs_NS[in_step_NS].double()
    covariances = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
    if loss == "kl_cov":
        count = max(1, int(config.kl_cov_ratio * len(covariances)))
        chosen = covariances.topk(min(count, len(covariances))).indices
    else:
        between = (covariances > config.clip_cov_lb) & (covariances < config.clip_cov_ub)
        candidates = between.nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(candidates), generator=generator)
        chosen = candidates[order[: max(1, int(config.clip_cov_ratio * len(covariances)))]]
    chosen_NS[in_step_NS] = torch.zeros(len(covariances), dtype=torch.bool).index_fill(
        0, chosen, True
    )
    return chosen_NS
