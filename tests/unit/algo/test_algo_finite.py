"""Finite numbers in, finite numbers out: losses, gradients, metrics, advantages, log-probs."""

import math
from dataclasses import replace

import pytest
import torch
from algo_cases import make_batch, make_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.algo.advantages import advantage_estimators, compute_advantages
from rlsys.algo.batching import pack
from rlsys.algo.finite import PER_TOKEN, count_nonfinite, found_text, nonfinite_entries
from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.sampling import Sampling
from rlsys.algo.segments import Segments
from rlsys.algo.update_metrics import MetricSums
from rlsys.algo.weighting import loss_weights
from rlsys.config import GrpoConfig
from rlsys.types import RewardOutput

TOKENS = 6
LOGPROBS = st.sampled_from([0.0, -0.0, 1e-7, -1e-7, -1e-3, -1.0, -20.0, -88.0, -104.0, -1e4, -1e30])
ADVANTAGES = st.sampled_from([0.0, 1e-30, 1.0, -1.0, 1e6, -1e6])
OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.0, 0.1]),
        "kl_estimator": st.sampled_from([None, "k1", "k2", "k3"]),
        "use_bias_correction_kl": st.booleans(),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "rollout_is": st.sampled_from(["none", "token", "sequence", "sequence_mask", "geometric"]),
        "rollout_rs": st.sampled_from(["none", "token", "sequence", "geometric", "token_k3"]),
        "off_policy_mask_threshold": st.sampled_from([None, 0.1]),
        "rollout_token_veto_threshold": st.sampled_from([None, 1e-4]),
        "vespo_lambda_pos": st.sampled_from([3.0, 1e-12]),
        "vespo_k_pos": st.sampled_from([2.0, 20.0]),
    }
)
BUILT_IN = sorted(name for name in losses.data if name not in ("plain", "squared"))


def numbers(draw, strategy):
    return torch.tensor(draw.draw(st.lists(strategy, min_size=TOKENS, max_size=TOKENS)))


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=150, deadline=None)
@given(draw=st.data(), options=OPTIONS, of_policy=st.booleans())
def test_every_loss_of_finite_numbers_is_finite_with_a_finite_gradient(
    name, draw, options, of_policy
):
    config = GrpoConfig(loss_type=name, **options)
    old = numbers(draw, LOGPROBS)
    logprobs = old.clone() if of_policy else numbers(draw, LOGPROBS.filter(lambda x: x > -1e20))
    mask = torch.tensor([True, True, False, True, True, True])
    inputs = LossInput(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=old,
        ref_logprobs=numbers(draw, LOGPROBS) if config.beta else None,
        rollout_logprobs=numbers(draw, LOGPROBS),
        advantages=numbers(draw, ADVANTAGES) * mask,
        weights=torch.full((TOKENS,), 0.2) * mask,
        mask=mask,
        segments=Segments(ids_T=torch.tensor([0, 0, 0, 1, 1, 2]), num_sequences=3),
        entropy=torch.rand(TOKENS),
        high_covariance=torch.tensor([True, False] * 3) if "cov" in name else None,
    )
    if logprobs.min() < -1e20:  # a loss that multiplies by it may be as large as that
        return
    loss, statistics = losses[name](inputs, config)
    (grad,) = torch.autograd.grad(loss, inputs.logprobs)
    sums = MetricSums()
    sums.add(statistics)
    assert math.isfinite(loss.item())
    assert grad.isfinite().all()
    difference = ("sampling/logp_difference/mean", "sampling/logp_difference/max")
    assert all(math.isfinite(v) for k, v in sums.means().items() if k not in difference)


def test_a_certain_token_that_rounding_puts_above_one_is_still_bounded():
    """log(1 - p) of a p above 1 would be NaN, which is not above any bound."""
    inputs = LossInput(
        logprobs=torch.tensor([1.2e-7, 1.2e-7], requires_grad=True),
        old_logprobs=torch.tensor([-1.0, -1.0]),
        ref_logprobs=None,
        rollout_logprobs=torch.tensor([-1.0, -1.0]),
        advantages=torch.ones(2),
        weights=torch.full((2,), 0.5),
        mask=torch.ones(2, dtype=torch.bool),
        segments=Segments(ids_T=torch.zeros(2, dtype=torch.int64), num_sequences=1),
    )
    _, statistics = losses["dppo_kl"](inputs, GrpoConfig(loss_type="dppo_kl"))
    assert statistics["clip_ratio/high_mean"] == 2


REWARDS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-300, -1e-160, 1e30, -1e30, math.nan]),
    st.floats(-1e30, 1e30),
)


@pytest.mark.parametrize("estimator", sorted(advantage_estimators.data))
@settings(max_examples=100, deadline=None)
@given(
    rewards=st.lists(REWARDS, min_size=6, max_size=6),
    scale=st.sampled_from(["auto", "group", "batch", "none"]),
    in_reward=st.booleans(),
)
def test_advantages_of_finite_rewards_are_finite(estimator, rewards, scale, in_reward):
    if estimator == "maxrl":
        rewards = [abs(value) for value in rewards]
    groups = make_groups([[2, 3, 1], [1, 4, 2]])
    totals = iter(rewards)
    groups = [
        replace(
            g,
            rewards=[
                RewardOutput(total=x, by_name={"a": x}) for x in (next(totals) for _ in g.rewards)
            ],
        )
        for g in groups
    ]
    batch = make_batch([[2, 3, 1], [1, 4, 2]])
    config = GrpoConfig(
        advantage_estimator=estimator, scale_rewards=scale, beta=0.1, kl_in_reward=in_reward
    )
    advantages = compute_advantages(groups, batch, config, None)
    assert advantages.isfinite().all()
    dropped = torch.tensor([math.isnan(value) for value in rewards])
    assert (advantages[dropped] == 0).all()


def test_what_makes_an_advantage_of_a_kept_completion_nan_is_not_hidden():
    groups, batch = make_groups([[2, 3]]), make_batch([[2, 3]])
    row, token = batch.completion_mask.nonzero()[0].tolist()
    batch.ref_logprobs[row, token] = torch.nan
    config = GrpoConfig(beta=0.1, kl_in_reward=True, advantage_estimator="reinforce_plus_plus")
    assert compute_advantages(groups, batch, config, None).isnan().any()


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4, 1e30, -1e30, 1e-30]), min_size=5, max_size=5
    ),
    target=st.integers(0, 4),
    sampling=st.sampled_from(
        [
            Sampling(),
            Sampling(0.01),
            Sampling(0.7, top_k=2),
            Sampling(1.3, top_p=0.5),
            Sampling(min_p=0.2, num_token_ids=4),
        ]
    ),
)
def test_entropies_and_all_gradients_of_finite_logits_are_finite(logits, target, sampling):
    rows = torch.tensor([logits, logits[::-1]], requires_grad=True)
    targets = torch.tensor([target, 4 - target])
    logprobs, entropy = chunked_logprobs(
        rows, torch.eye(5), targets, sampling=sampling, chunk_size=1
    )
    (logprobs.clamp(min=-1e6).sum() + entropy.sum()).backward()
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert rows.grad.isfinite().all()


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*PER_TOKEN, "logprobs"]),
            st.integers(0, 3),
            st.integers(0, 8),
            st.sampled_from([math.nan, math.inf, -math.inf]),
        ),
        max_size=6,
    )
)
def test_every_bad_number_of_a_trained_token_is_counted_and_no_other(places):
    batch = make_batch([[4, 2], [3, 5]])
    logprobs = batch.old_logprobs.clone()
    width = batch.input_ids.shape[1]
    places = {(name, row, token % width): value for name, row, token, value in places}
    for (name, row, token), value in places.items():
        (logprobs if name == "logprobs" else getattr(batch, name))[row, token] = value
    weights = loss_weights(batch.completion_mask, aggregation="token_mean", max_completion_length=5)
    packed = pack(batch, [2, 0, 1, 3], weights, multiple_of=7)
    assert packed.rows == (2, 0, 1, 3)
    own = pack(replace(batch, old_logprobs=logprobs), [2, 0, 1, 3], weights, multiple_of=7)
    counts = count_nonfinite(packed, own.old_logprobs, torch.tensor(math.nan))
    expected = dict.fromkeys([*PER_TOKEN, "logprobs"], 0)
    for name, row, token in places:
        expected[name] += bool(batch.completion_mask[row, token])
    assert {key.removeprefix("nonfinite/"): int(v) for key, v in counts.items()} == {
        "loss": 1,
        **expected,
    }
    for name in PER_TOKEN:
        assert len(nonfinite_entries(batch, name)) == expected[name]


def test_counts_for_people():
    found = {"loss": 1, "gradient": 1, "logprobs": 1, "advantages": 1200}
    text = "loss, gradient, 1 value of the policy's log-probs, 1,200 values of advantages"
    assert found_text(found) == text
