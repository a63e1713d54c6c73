"""Clip-Cov and KL-Cov (arXiv:2505.22617): which tokens are chosen, and what becomes of them."""

from dataclasses import replace

import pytest
import torch
from algo_cases import make_batch

from rlsys.algo.batching import micro_batches, pack
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.update_metrics import MetricSums
from rlsys.algo.weighting import loss_weights, tokens_of_high_covariance
from rlsys.config import Config, GrpoConfig

LENGTHS_PG = [[5, 2, 1, 7], [3, 8, 4, 0]]
ROWS = range(8)


@pytest.fixture(scope="module")
def case():
    """A batch whose old log-probs and advantages are spread widely, and log-probs near the old."""
    batch = make_batch(LENGTHS_PG)
    rng = torch.Generator().manual_seed(3)
    noise = torch.randn(2, *batch.advantages.shape, generator=rng)
    batch.old_logprobs = (-3 - 2 * noise[0].abs()) * batch.completion_mask
    return batch, (batch.old_logprobs + 0.3 * noise[1]) * batch.completion_mask


def choose(batch, logprobs, config, rows=ROWS, seed=0):
    before = replace(batch, old_logprobs=logprobs)
    return tokens_of_high_covariance(before, rows, config, seed=seed)


def run(batch, logprobs, config, chosen, size=8):
    """Loss, gradient [N, S] and metrics, in micro-batches of `size` completions."""
    batch = replace(batch, high_covariance=chosen)
    weights = loss_weights(batch.completion_mask, aggregation="token_mean", max_completion_length=9)
    leaf, sums, total = logprobs.clone().requires_grad_(), MetricSums(), 0.0
    pieces = micro_batches(ROWS, batch.lengths, micro_batch_size=size, max_tokens=None)
    for rows in pieces:
        packed = pack(batch, rows, weights)
        now = pack(replace(batch, rollout_logprobs=leaf), rows, weights).rollout_logprobs
        loss, statistics = losses[config.loss_type](LossInput.from_packed(packed, now), config)
        loss.backward()
        total += loss.item()
        sums.add(statistics)
    return total, leaf.grad, sums.means()


def covariances(batch, logprobs):
    """By the paper: deviations from the mean over all tokens, in a flat list."""
    mask = batch.completion_mask
    a, x = batch.advantages[mask], logprobs[mask]
    return (a - a.mean()) * (x - x.mean())


def papers(batch, logprobs, config, treat):
    """Loss and gradient from flat tokens; `treat(loss, clipped, log_ratio)` is what differs."""
    mask, leaf = batch.completion_mask, logprobs.clone().requires_grad_()
    a, log_ratio = batch.advantages[mask], leaf[mask] - batch.old_logprobs[mask]
    low, high = config.clip_range
    unclipped, bounded = -a * log_ratio.exp(), -a * log_ratio.exp().clamp(low, high)
    loss = treat(unclipped, torch.maximum(unclipped, bounded), log_ratio).mean()
    loss.backward()
    return loss.item(), leaf.grad


def assert_equal(ours, expected):
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-7)


def test_clip_cov_takes_tokens_out_of_the_clipped_surrogate(case):
    batch, logprobs = case
    config = GrpoConfig(loss_type="clip_cov", clip_cov_ratio=1, clip_cov_lb=0.1, clip_cov_ub=2)
    between = (covariances(batch, logprobs) > 0.1) & (covariances(batch, logprobs) < 2)
    assert 0 < between.sum() < len(between)
    expected = papers(batch, logprobs, config, lambda _, clipped, __: clipped * ~between)
    ours = run(batch, logprobs, config, choose(batch, logprobs, config))
    assert_equal(ours, expected)
    assert ours[2]["clip_ratio/cov_mean"] == pytest.approx(between.float().mean().item())


@pytest.mark.parametrize(("share", "count"), [(1e-4, 1), (0.2, 6)])
def test_kl_cov_penalizes_the_tokens_of_the_highest_covariance(case, share, count):
    batch, logprobs = case
    config = GrpoConfig(loss_type="kl_cov", kl_cov_ratio=share, ppo_kl_coef=0.7)
    highest = covariances(batch, logprobs).argsort(descending=True)[:count]
    penalized = torch.zeros(len(covariances(batch, logprobs)), dtype=torch.bool)
    penalized[highest] = True
    expected = papers(batch, logprobs, config, lambda loss, _, x: loss + 0.7 * x.abs() * penalized)
    assert_equal(run(batch, logprobs, config, choose(batch, logprobs, config)), expected)


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_the_choice_of_a_step_does_not_depend_on_how_it_is_split(case, loss_type):
    batch, logprobs = case
    config = GrpoConfig(
        loss_type=loss_type, clip_cov_ratio=0.2, clip_cov_lb=0, clip_cov_ub=9, kl_cov_ratio=0.2
    )
    chosen = choose(batch, batch.old_logprobs, config)
    whole, split = (run(batch, logprobs, config, chosen, size=size) for size in (8, 1))
    assert_equal(split, whole)
    assert split[2] == pytest.approx(whole[2], rel=1e-5)
    assert 0 < whole[2]["clip_ratio/cov_mean"] < 1


def test_clip_cov_draws_its_share_by_seed_from_the_tokens_of_the_step(case):
    batch, logprobs = case
    config = GrpoConfig(loss_type="clip_cov", clip_cov_ratio=0.1, clip_cov_lb=-99, clip_cov_ub=99)
    draws = [choose(batch, logprobs, config, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].sum() == 3  # a tenth of 30 tokens
    part = choose(batch, logprobs, config, rows=[4, 5])
    assert part.sum() == 1  # at least one
    assert not part[[0, 1, 2, 3, 6, 7]].any()
    none = config.model_copy(update={"clip_cov_lb": 98})
    assert not choose(batch, logprobs, none).any()


def test_a_step_without_tokens_chooses_none(case):
    batch, logprobs = case
    for loss_type in ("clip_cov", "kl_cov"):
        config = GrpoConfig(loss_type=loss_type)
        assert not choose(batch, logprobs, config, rows=[7]).any()


@pytest.mark.parametrize("loss_type", ["clip_cov", "kl_cov"])
def test_the_choice_has_log_probs_from_before_the_update(loss_type):
    from config_cases import values

    config = Config.model_validate(values(grpo={"loss_type": loss_type}))
    assert config.optimizer_steps_per_update == 1
    assert config.recompute_old_logprobs
