import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.algo.kl import MAX_LOG_RATIO, k3
from rlsys.algo.losses import LossInput, losses, policy_loss, register_loss
from rlsys.algo.segments import Segments
from rlsys.algo.update_metrics import MetricSums
from rlsys.config import GrpoConfig

grpo = losses["grpo"]
sft = losses["sft"]


def loss_input(**fields):
    """Two tokens in float64, old = policy = rollout, weight 1/2, advantages 1 and -1."""
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    values = {
        "logprobs": logprobs,
        "old_logprobs": logprobs,
        "ref_logprobs": None,
        "rollout_logprobs": logprobs,
        "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64),
        "weights": torch.full((2,), 0.5, dtype=torch.float64),
        "mask": torch.ones(2, dtype=torch.bool),
    }
    values |= {
        name: value if value is None or name == "segments" else torch.as_tensor(value)
        for name, value in fields.items()
    }
    one_sequence = torch.zeros(len(values["mask"]), dtype=torch.int64)
    values.setdefault("segments", Segments(ids_T=one_sequence, num_sequences=1))
    values["logprobs"] = values["logprobs"].clone().requires_grad_()
    return LossInput(**values)


def random_input(tokens, seed, *, spread=0.5, with_reference=True):
    rng = torch.Generator().manual_seed(seed)

    def near(values):
        return values + spread * torch.randn(tokens, generator=rng)

    logprobs = -3 * torch.rand(tokens, generator=rng)
    old = near(logprobs)
    mask = torch.rand(tokens, generator=rng) < 0.6
    mask[0] = True
    return loss_input(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=near(logprobs) if with_reference else None,
        rollout_logprobs=near(old),
        advantages=torch.randn(tokens, generator=rng) * mask,
        weights=torch.rand(tokens, generator=rng) * mask,
        mask=mask,
        entropy=torch.rand(tokens, generator=rng),
    )


def run(loss_function, inputs, config):
    loss, statistics = loss_function(inputs, config)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    sums = MetricSums()
    sums.add(statistics)
    return loss.item(), grad, sums.means()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        # L = -min(r A, clip(r, 0.8, 1.3) A); dL/dlogprob = -r A where min() takes the first term.
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),
        (1.5, 2.0, -2.6, 0.0),  # clipped above: no reason to go further
        (0.5, 2.0, -1.0, -1.0),  # a good token that became unlikely is brought back
        (0.5, -2.0, 1.6, 0.0),  # clipped below
        (1.5, -2.0, 3.0, 3.0),  # a bad token that became likely is brought back
    ],
)
def test_clipped_surrogate_worked(ratio, advantage, loss, grad):
    config = GrpoConfig(epsilon=0.2, epsilon_high=0.3)
    inputs = loss_input(
        logprobs=torch.tensor([-1.0], dtype=torch.float64),
        old_logprobs=torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64),
        rollout_logprobs=[-1.0],
        advantages=torch.tensor([advantage], dtype=torch.float64),
        weights=torch.ones(1, dtype=torch.float64),
        mask=[True],
    )
    our_loss, our_grad, metrics = run(grpo, inputs, config)
    assert our_loss == pytest.approx(loss)
    assert our_grad.item() == pytest.approx(grad)
    clipped = {(1.5, 2.0): "high", (0.5, -2.0): "low"}.get((ratio, advantage))
    assert metrics["clip_ratio/high_mean"] == (clipped == "high")
    assert metrics["clip_ratio/low_mean"] == (clipped == "low")
    assert metrics["clip_ratio/region_mean"] == (clipped is not None)
    assert metrics["ratio/mean"] == pytest.approx(ratio)


def test_upper_clip_is_epsilon_unless_set():
    inputs = loss_input(old_logprobs=torch.tensor([-1.0, -2.0]) - math.log(1.25))
    with_default = grpo(inputs, GrpoConfig(epsilon=0.2))[0]
    assert with_default == grpo(inputs, GrpoConfig(epsilon=0.2, epsilon_high=0.2))[0]
    assert with_default != grpo(inputs, GrpoConfig(epsilon=0.2, epsilon_high=0.3))[0]


@given(tokens=st.integers(1, 8), seed=st.integers(0, 99))
def test_at_ratio_one_clipping_changes_nothing(tokens, seed):
    inputs = random_input(tokens, seed, with_reference=False)
    inputs = replace(inputs, old_logprobs=inputs.logprobs.detach())
    loss, grad, metrics = run(grpo, inputs, GrpoConfig(epsilon=1e-6))
    # Without clipping, at ratio 1: L = -sum w A and dL/dlogprob = -w A.
    assert loss == pytest.approx(-(inputs.weights * inputs.advantages).sum().item(), abs=1e-6)
    torch.testing.assert_close(grad, -inputs.weights * inputs.advantages)
    for key in ("ratio/mean", "ratio/min", "ratio/max"):
        assert metrics[key] == 1
    for key in ("low_mean", "high_mean", "region_mean"):
        assert metrics[f"clip_ratio/{key}"] == 0


@given(tokens=st.integers(1, 8), seed=st.integers(0, 99), beta=st.floats(0.01, 10))
def test_kl_of_a_policy_that_is_its_reference_is_zero(tokens, seed, beta):
    inputs = random_input(tokens, seed)
    same = replace(inputs, ref_logprobs=inputs.logprobs.detach())
    without = replace(inputs, ref_logprobs=None)
    loss, grad, metrics = run(grpo, same, GrpoConfig(beta=beta))
    expected_loss, expected_grad, expected_metrics = run(grpo, without, GrpoConfig())
    assert metrics.pop("kl") == 0
    assert "kl" not in expected_metrics
    assert (loss, metrics) == (expected_loss, expected_metrics)
    assert torch.equal(grad, expected_grad)


def test_k3_estimates_the_kl_without_bias():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k3((q / p).log())).sum(), exact)


@given(st.floats(-MAX_LOG_RATIO, MAX_LOG_RATIO))
def test_k3_is_never_negative(log_ratio):
    assert k3(torch.tensor(log_ratio)) >= 0


def test_beta_adds_the_kl_worked():
    inputs = loss_input(ref_logprobs=torch.tensor([-1.5, -1.5], dtype=torch.float64))
    loss, grad, metrics = run(grpo, inputs, GrpoConfig(beta=0.1))
    # Surrogate at ratio 1 with A = 1, -1: 0. k3 of ref - logprob = -0.5, +0.5.
    k3_values = [math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]
    assert loss == pytest.approx(0.1 * sum(k3_values) / 2)
    assert metrics["kl"] == pytest.approx(sum(k3_values) / 2)
    # dk3/dlogprob = 1 - exp(ref - logprob).
    expected = [0.5 * (-1 + 0.1 * (1 - math.exp(-0.5))), 0.5 * (1 + 0.1 * (1 - math.exp(0.5)))]
    assert grad.tolist() == pytest.approx(expected)


def test_mismatch_with_the_rollout_engine_is_measured_before_the_update():
    inputs = loss_input(
        logprobs=[-9.0, -9.0], old_logprobs=[-1.0, -2.0], rollout_logprobs=[-1.5, -1.8]
    )
    _, _, metrics = run(grpo, inputs, GrpoConfig())
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(0.35)
    assert metrics["sampling/logp_difference/max"] == pytest.approx(0.5)
    expected = (math.exp(0.5) - 0.5 - 1 + math.exp(-0.2) + 0.2 - 1) / 2
    assert metrics["sampling/kl"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [0.5, -0.5])
def test_extremes_of_the_ratio_are_over_trained_tokens_only(log_ratio):
    inputs = loss_input(
        logprobs=torch.tensor([-1.0, -1.0]),
        old_logprobs=torch.tensor([-1.0 - log_ratio, -1.0]),
        mask=torch.tensor([True, False]),
    )
    _, _, metrics = run(grpo, inputs, GrpoConfig())
    for key in ("ratio/mean", "ratio/min", "ratio/max"):
        assert metrics[key] == pytest.approx(math.exp(log_ratio)), key


def test_sft_is_the_weighted_negative_log_likelihood():
    inputs = loss_input(weights=torch.tensor([0.25, 0.75], dtype=torch.float64))
    loss, grad, metrics = run(sft, inputs, GrpoConfig())
    assert loss == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert grad.tolist() == [-0.25, -0.75]
    assert metrics == {"loss": loss, "num_loss_tokens": 2}


@pytest.mark.parametrize("name", sorted(losses))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_masked_positions_are_never_read(name, garbage):
    inputs = random_input(12, seed=3)
    assert 0 < inputs.mask.sum() < 12

    def spoil(values):
        return torch.where(inputs.mask, values.detach(), garbage)

    fields = ("ref_logprobs", "old_logprobs", "rollout_logprobs", "entropy")
    spoilt = replace(inputs, **{field: spoil(getattr(inputs, field)) for field in fields})
    config = GrpoConfig(
        loss_type=name,
        beta=0.1,
        use_bias_correction_kl=True,
        entropy_coef=0.1,
        rollout_is="sequence",
        rollout_rs="geometric",
        off_policy_mask_threshold=0.1,
    )
    spoilt = replace(spoilt, logprobs=spoil(inputs.logprobs).requires_grad_())
    loss, grad, metrics = run(losses[name], inputs, config)
    spoilt_loss, spoilt_grad, spoilt_metrics = run(losses[name], spoilt, config)
    assert (spoilt_loss, spoilt_metrics) == (loss, metrics)
    assert torch.equal(spoilt_grad, grad)


@pytest.mark.parametrize("distance", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("other", ["old_logprobs", "ref_logprobs"])
def test_a_policy_far_from_where_it_was_has_a_finite_gradient(other, distance):
    # exp(100) is inf in float32; one such token must not turn all weights into nan.
    inputs = loss_input(
        logprobs=torch.tensor([-1.0, -2.0]),
        **{other: torch.tensor([-1.0 - distance, -2.0 - distance])},
    )
    loss, grad, metrics = run(grpo, inputs, GrpoConfig(beta=0.1))
    assert math.isfinite(loss)
    assert grad.isfinite().all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_loss_of_ones_own_is_one_function():
    @register_loss("reinforce-of-a-test")
    def reinforce(inputs, config):
        return policy_loss(inputs, config, -inputs.advantages * inputs.logprobs)

    try:
        loss, _ = losses["reinforce-of-a-test"](loss_input(), GrpoConfig())
        assert loss.item() == pytest.approx(-(0.5 * -1.0 + 0.5 * -1.0 * -2.0))
        with pytest.raises(ValueError, match=r"Did you mean 'grpo'"):
            losses["gprpo"]
    finally:
        del losses["reinforce-of-a-test"]


def one_token(ratio, advantage, **fields):
    """A completion of one token, of weight 1."""
    one = torch.ones(1, dtype=torch.float64)
    values = {
        "logprobs": -one,
        "old_logprobs": -one - math.log(ratio),
        "rollout_logprobs": -one - math.log(ratio),
        "advantages": advantage * one,
        "weights": one,
        "mask": [True],
    }
    return loss_input(**values | fields)


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "loss", "grad"),
    [
        # -min(r A, clip(r, 0.8, 1.2) A), but at least c A = 3 A for A < 0.
        ("dual_clip", 2.0, -1.0, 2.0, 2.0),
        ("dual_clip", 5.0, -1.0, 3.0, 0.0),
        ("dual_clip", 5.0, 1.0, -1.2, 0.0),
        # A sequence of one token: its geometric mean is the token's ratio.
        ("gspo", 1.1, 1.0, -1.1, -1.1),
        ("gspo", 1.5, 1.0, -1.2, 0.0),
        # -min(r, 1.2) A log pi with log pi = -1.
        ("cispo", 1.1, 2.0, 2.2, -2.2),
        ("cispo", 1.5, 2.0, 2.4, -2.4),
        ("cispo", 0.1, -2.0, -0.2, 0.2),
        # 4 sigmoid(r - 1) = 4 / (1 + e^-1) at r = 2; its slope 4 s (1 - s), times r for log pi.
        ("sapo", 2.0, 1.0, -4 / (1 + math.exp(-1)), -8 * math.exp(-1) / (1 + math.exp(-1)) ** 2),
        ("reinforce", 2.0, 1.5, 1.5, -1.5),
    ],
)
def test_losses_of_one_token_worked(name, ratio, advantage, loss, grad):
    ours, gradient, _ = run(losses[name], one_token(ratio, advantage), GrpoConfig(loss_type=name))
    assert ours == pytest.approx(loss)
    assert gradient.item() == pytest.approx(grad)


def test_the_ratio_of_a_sequence_worked():
    """GSPO (arXiv:2507.18071), equations 7 and 14: two sequences, of two tokens and of one."""
    segments = Segments(ids_T=torch.tensor([0, 0, 1]), num_sequences=2)
    logs = torch.tensor([0.1, 0.3, -0.2], dtype=torch.float64)
    logprobs = torch.full((3,), -2.0, dtype=torch.float64)
    inputs = loss_input(
        logprobs=logprobs,
        old_logprobs=logprobs - logs,
        rollout_logprobs=logprobs - logs,
        advantages=torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64),
        weights=torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64),
        mask=torch.ones(3, dtype=torch.bool),
        segments=segments,
    )
    config = GrpoConfig(loss_type="gspo", epsilon=0.9)
    loss, grad, metrics = run(losses["gspo"], inputs, config)
    first, second = math.exp(0.2), math.exp(-0.2)
    assert loss == pytest.approx(-(0.5 * first - 0.5 * 2 * second))
    assert grad.tolist() == pytest.approx([-0.25 * first, -0.25 * first, second])
    assert metrics["ratio/max"] == pytest.approx(first)
    # Each token's own advantage meets the sequence's ratio: only there do the two levels differ.
    shaped = replace(inputs, advantages=torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
    whole = run(losses["gspo"], shaped, config)[1]
    of_tokens = GrpoConfig(
        loss_type="gspo", epsilon=0.9, importance_sampling_level="sequence_token"
    )
    tokens = run(losses["gspo"], shaped, of_tokens)[1]
    assert whole.tolist() == pytest.approx([-0.5 * first, -0.5 * first, second])
    assert tokens.tolist() == pytest.approx([-0.75 * first, -0.25 * first, second])


@pytest.mark.parametrize("stale", [False, True])
def test_the_bias_corrected_kl_has_the_gradient_of_the_kl(stale):
    """In expectation over the sampler's samples, exactly; k3 as it stands has another one."""
    z = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    old = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64) if stale else sampler
    correction = {"rollout_is": "token"} if stale else {}
    ref = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    log_pi = torch.log_softmax(z, dim=0)
    exact = (log_pi.exp() * (log_pi - ref.log())).sum()
    (expected,) = torch.autograd.grad(exact, z, retain_graph=True)

    def gradient(**options):
        inputs = replace(
            loss_input(
                logprobs=torch.zeros(3),
                old_logprobs=old.log(),
                ref_logprobs=ref.log(),
                rollout_logprobs=sampler.log(),
                advantages=torch.zeros(3, dtype=torch.float64),
                weights=sampler,  # each token as often as it is sampled
                mask=torch.ones(3, dtype=torch.bool),
            ),
            logprobs=log_pi,
        )
        loss, _ = losses["grpo"](inputs, GrpoConfig(beta=1.0, **options, **correction))
        return torch.autograd.grad(loss, z, retain_graph=True)[0]

    for estimator in ("k1", "k3"):
        corrected = gradient(kl_estimator=estimator, use_bias_correction_kl=True)
        torch.testing.assert_close(corrected, expected)
    assert (gradient(kl_estimator="k3") - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        # One token, old policy / rollout engine = 3.
        ({"rollout_is": "token"}, 2.0),
        ({"rollout_is": "token", "rollout_is_threshold": 5.0}, 3.0),
        ({"rollout_is": "sequence", "rollout_is_threshold": 2.5}, 2.5),
        ({"rollout_rs": "token"}, 0.0),
        ({"rollout_rs": "geometric", "rollout_rs_threshold": 3.5}, 1.0),
        ({"rollout_is": "token", "rollout_rs": "token", "rollout_rs_threshold": 4.0}, 2.0),
        ({}, 1.0),
        ({"rollout_is": "none"}, 1.0),
    ],
    ids=str,
)
def test_correction_of_one_token_worked(options, weight):
    inputs = one_token(1.0, -1.5, rollout_logprobs=[-1.0 - math.log(3.0)])
    loss, grad, metrics = run(grpo, inputs, GrpoConfig(**options))
    assert loss == pytest.approx(1.5 * weight)
    assert grad.item() == pytest.approx(1.5 * weight)
    if options.get("rollout_is", "none") != "none" or "rollout_rs" in options:
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(weight)
        assert metrics["sampling/masked_fraction"] == (weight == 0)
        assert metrics["sampling/clipped_fraction"] == (weight in (2.0, 2.5))
        share = metrics["sampling/importance_sampling_ratio/effective_sample_size"]
        assert share == pytest.approx(float(weight > 0))


def test_two_completions_of_which_one_is_better_worked():
    """On-policy: rewards 1 and 0, one token each, unit std: the better one is made likelier."""
    inputs = loss_input(
        advantages=torch.tensor([0.5, -0.5], dtype=torch.float64) / (math.sqrt(0.5) + 1e-4)
    )
    for name in sorted(set(losses) - {"sft"}):
        _, grad, _ = run(losses[name], inputs, GrpoConfig(loss_type=name))
        size = 0.25 / (math.sqrt(0.5) + 1e-4)
        if name in (
            "gspo",
            "luspo",
            "gmpo",
        ):  # here one sequence: its two tokens share what each earns
            assert grad.tolist() == pytest.approx([0.0, 0.0]), name
        else:
            assert grad.tolist() == pytest.approx([-size, size]), name
