"""How much each token counts in an optimizer step: decided before the step is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlsys.config.algorithm import COVARIANCE_LOSSES

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.config import GrpoConfig
    from rlsys.config.algorithm import Aggregation
    from rlsys.types import RolloutGroup, TrainBatch


def leave_out(
    batch: TrainBatch, groups: list[RolloutGroup], *, mask_truncated_completions: bool
) -> None:
    """Take completions out of the loss, in place, once their advantages are known.

    Clears their mask, advantages and log-probs. A completion without a reward (NaN) is dropped: it
    is no longer `kept`. With `mask_truncated_completions` a completion that was cut at the length
    limit loses its tokens but still counts as a completion, as in TRL; DAPO (arXiv:2503.14476),
    section 3.4, overlong filtering.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    completions = [completion for group in groups for completion in group.completions]
    batch.kept = torch.tensor([not math.isnan(reward.total) for reward in rewards])
    trained_N = batch.kept
    if mask_truncated_completions:
        trained_N = trained_N & torch.tensor([c.finish_reason != "length" for c in completions])
    batch.completion_mask &= trained_N[:, None]
    per_token = (batch.advantages, batch.rollout_logprobs, batch.ref_logprobs, batch.old_logprobs)
    for values_NS in per_token:
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
        max_completion_length: rollout.max_completion_length, for seq_mean_token_sum_norm.
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


def choose_tokens(
    batch: TrainBatch, rows: Sequence[int], config: GrpoConfig, *, seed: int
) -> TrainBatch:
    """The batch for the optimizer step on `rows`, with some of its tokens changed.

    `top_entropy_quantile` sets advantages to 0, clip_cov and kl_cov set `high_covariance`. Both
    choose by log-probs and entropies before the update, over the whole optimizer step: so the
    choice does not depend on how the step is split.
    """
    if batch.entropies is not None and config.top_entropy_quantile < 1:
        advantages = keep_high_entropy(batch, rows, quantile=config.top_entropy_quantile)
        batch = replace(batch, advantages=advantages)
    if config.loss_type in COVARIANCE_LOSSES:
        high_covariance = tokens_of_high_covariance(batch, rows, config, seed=seed)
        batch = replace(batch, high_covariance=high_covariance)
    return batch


def keep_high_entropy(batch: TrainBatch, rows: Sequence[int], *, quantile: float) -> Tensor:
    """[N, S] advantages of the tokens of highest entropy, 0 for the others.

    arXiv:2506.01939, equation 5: the share `quantile` of the tokens of `rows` that the policy was
    least sure of. A token of advantage 0 has no policy gradient, but still counts in denominators,
    in the KL and in the entropy bonus.
    """
    assert batch.entropies is not None
    rows = list(rows)
    in_step = batch.entropies[rows][batch.completion_mask[rows]]
    if len(in_step) == 0:
        return batch.advantages
    # torch.quantile, with its linear interpolation, refuses more than 16 million values.
    position = (1 - quantile) * (len(in_step) - 1)
    ordered = in_step.double().sort().values
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    threshold = below + (above - below) * (position - math.floor(position))
    return batch.advantages.masked_fill(batch.entropies.double() < threshold, 0.0)


def tokens_of_high_covariance(
    batch: TrainBatch, rows: Sequence[int], config: GrpoConfig, *, seed: int
) -> Tensor:
    """[N, S] bool, the tokens of `rows` that clip_cov or kl_cov treats apart.

    `cov_t = (A_t - mean A) (log pi_old - mean log pi_old)` (arXiv:2505.22617) drives the entropy
    down. clip_cov draws `clip_cov_ratio` of the tokens from those between `clip_cov_lb` and
    `clip_cov_ub`, by `seed`; kl_cov takes the highest `kl_cov_ratio`.
    """
    assert batch.old_logprobs is not None, "Config.recompute_old_logprobs is for this, too"
    in_step_NS = torch.zeros_like(batch.completion_mask)
    in_step_NS[list(rows)] = batch.completion_mask[list(rows)]
    advantages = batch.advantages[in_step_NS].double()
    logprobs = batch.old_logprobs[in_step_NS].double()
    covariances = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
    if config.loss_type == "kl_cov":
        count = max(1, int(config.kl_cov_ratio * len(covariances)))
        chosen = covariances.topk(min(count, len(covariances))).indices
    else:
        between = (covariances > config.clip_cov_lb) & (covariances < config.clip_cov_ub)
        candidates = between.nonzero().flatten()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(candidates), generator=generator)
        chosen = candidates[order[: max(1, int(config.clip_cov_ratio * len(covariances)))]]
    is_chosen = torch.zeros(len(covariances), dtype=torch.bool).index_fill(0, chosen, True)
    return torch.zeros_like(in_step_NS).masked_scatter(in_step_NS, is_chosen)
