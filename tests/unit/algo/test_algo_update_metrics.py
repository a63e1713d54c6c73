import pytest
import torch

from rlsys.algo.update_metrics import MetricSums, combine_optimizer_steps


def test_a_step_without_tokens_is_an_error_not_nan():
    sums = MetricSums()
    sums.add({"loss": torch.tensor(0.0), "num_loss_tokens": torch.tensor(0.0)})
    with pytest.raises(AssertionError, match="without tokens to train on"):
        sums.means()


def test_optimizer_steps_combine_worked():
    steps = [
        {
            "loss": loss,
            "num_loss_tokens": tokens,
            "learning_rate": lr,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "ratio/min": 1 - low,
            "ratio/max": 1 + high,
        }
        for loss, tokens, lr, low, high in [
            (0.5, 100.0, 1e-6, 0.0, 0.02),
            (-0.1, 60.0, 2e-6, 0.04, 0.06),
        ]
    ]
    assert combine_optimizer_steps(steps) == pytest.approx(
        {
            "loss": 0.2,
            "num_loss_tokens": 160,
            "learning_rate": 2e-6,
            "clip_ratio/low_mean": 0.02,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_mean": 0.04,
            "clip_ratio/high_max": 0.06,
            "ratio/min": 0.96,
            "ratio/max": 1.06,
        }
    )


def test_a_moving_policy_is_compared_with_the_engine_before_it_moves():
    """With old_logprobs: rollout, later optimizer steps differ by what the earlier ones learned."""
    keys = ("sampling/logp_difference/mean", "sampling/logp_difference/max", "sampling/kl")
    steps = [
        {"num_loss_tokens": 10.0, "entropy": 1.0} | dict.fromkeys(keys, 1e-5),
        {"num_loss_tokens": 10.0, "entropy": 3.0} | dict.fromkeys(keys, 4.0),
    ]
    combined = combine_optimizer_steps(steps, sampling_of_first=True)
    assert [combined[key] for key in keys] == [1e-5] * 3
    assert combined["entropy"] == 2.0
    assert combine_optimizer_steps(steps)["sampling/logp_difference/max"] == 4.0
