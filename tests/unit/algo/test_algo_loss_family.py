"""Every registered loss, with every aggregation: equal to its paper however it is split.

A loss that is registered later is covered by the properties by itself, and asked for an oracle.
"""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from algo_cases import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracle import TOKEN_LOSSES, oracle_loss

from rlsys.algo.batching import micro_batches, pack, shard_rows, unpack_logprobs
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.update_metrics import MetricSums
from rlsys.algo.weighting import loss_weights
from rlsys.config import GrpoConfig
from rlsys.config.algorithm import CLIPPED_LOSSES, PRESETS, Aggregation

LENGTHS_PG = [[5, 2, 1, 7], [3, 8, 4, 0]]  # the last completion is empty: it counts, it adds 0
MAX_COMPLETION_LENGTH = 9
AGGREGATIONS = get_args(Aggregation)
POLICY_LOSSES = sorted(set(losses) - {"sft"})
OPTIONS = {
    "plain": {},
    "asymmetric clip, k3": {"epsilon_high": 0.3, "beta": 0.04},
    "delta": {"delta": 1.5},
    "k1": {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": True},
    "k2": {"beta": 0.1, "kl_estimator": "k2"},
    "unbiased k3": {"beta": 0.1, "use_bias_correction_kl": True},
    "unbiased k3 of stale data": {
        "beta": 0.1,
        "use_bias_correction_kl": True,
        "rollout_is": "token",
    },
    "kl in reward": {"beta": 0.1, "kl_in_reward": True},
    "entropy bonus": {"entropy_coef": 0.2},
    "token truncation": {"rollout_is": "token", "rollout_is_threshold": 1.1},
    "sequence truncation": {"rollout_is": "sequence", "rollout_is_threshold": 1.1, "beta": 0.1},
    "IcePop": {"rollout_is": "token", "rollout_rs": "token", "rollout_rs_threshold": 1.2},
    "sequence rejection": {"rollout_rs": "sequence", "rollout_rs_threshold": 1.5},
    "geometric rejection": {
        "rollout_is": "token",
        "rollout_rs": "geometric",
        "rollout_rs_threshold": 1.05,
        "rollout_rs_threshold_lower": 0.9,
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "ratios of sequences": {"importance_sampling_level": "sequence"},
    "lower clip": {"epsilon_low": 0.1},
    "divergence": {"epsilon": 0.005, "epsilon_high": 0.01},
    "mask": {"rollout_is": "token_mask", "rollout_is_threshold": 1.2},
    "truncation both ways": {
        "rollout_is": "geometric",
        "rollout_is_threshold": 1.05,
        "rollout_is_threshold_lower": 0.95,
    },
    "token k2": {"rollout_rs": "token_k2", "rollout_rs_threshold": 0.01},
    "mean k3": {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": 0.01},
    "sum k2": {"rollout_rs": "seq_sum_k2", "rollout_rs_threshold": 0.1},
    "maximal k3": {"rollout_rs": "seq_max_k3", "rollout_rs_threshold": 0.05},
    "veto": {"rollout_token_veto_threshold": 0.8},
    "veto of the likelier": {"rollout_token_veto_threshold_high": 1.3},
}


@pytest.fixture(scope="module")
def case():
    """A batch with all log-probs near each other, ratios on both sides of both clips."""
    batch = make_batch(LENGTHS_PG)
    rng = torch.Generator().manual_seed(2)

    def near(values, spread):
        noise = spread * torch.randn(values.shape, generator=rng)
        return (values + noise) * batch.completion_mask

    old = batch.old_logprobs
    batch.rollout_logprobs = near(old, 0.2)
    batch.ref_logprobs = near(old, 0.4)
    entropies = torch.rand(old.shape, generator=rng) * batch.completion_mask
    return batch, near(old, 0.3), entropies


def in_pieces(
    name, case, rows, config, aggregation, *, num_shards=1, multiple_of=1, **micro_batching
):
    """Loss, its gradients [2, N, S] and metrics, from packed micro-batches of shards."""
    batch, logprobs_NS, entropies_NS = case
    weights = loss_weights(
        batch.completion_mask,
        aggregation=aggregation,
        max_completion_length=MAX_COMPLETION_LENGTH,
        rows=rows,
        kept_N=batch.kept,
    )
    total, sums = 0.0, MetricSums()
    grads = torch.zeros(2, *logprobs_NS.shape)
    for shard in shard_rows(rows, batch.lengths, num_shards=num_shards):
        for piece in micro_batches(shard, batch.lengths, **micro_batching):
            packed = pack(batch, piece, weights, multiple_of=multiple_of)
            leaves = [
                pack(
                    replace(batch, rollout_logprobs=values), piece, weights, multiple_of=multiple_of
                )
                .rollout_logprobs.clone()
                .requires_grad_()
                for values in (logprobs_NS, entropies_NS)
            ]
            loss, statistics = losses[name](LossInput.from_packed(packed, *leaves), config)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for gradient, out in zip(gradients, grads, strict=True):
                if gradient is not None:
                    unpack_logprobs(gradient, packed, out, piece)
            sums.add(statistics)
            total += loss.item()
    return total, grads, sums.means()


def whole(name, case, rows, config, aggregation):
    """The same by the oracle."""
    batch, logprobs_NS, entropies_NS = case
    leaves = [logprobs_NS.clone().requires_grad_(), entropies_NS.clone().requires_grad_()]
    loss = oracle_loss(
        name,
        batch,
        *leaves,
        rows,
        config,
        aggregation=aggregation,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    return loss.item(), torch.stack(torch.autograd.grad(loss, leaves, materialize_grads=True))


def assert_equal(ours, expected):
    loss, grads = ours[:2]
    assert loss == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(grads, expected[1], rtol=1e-4, atol=1e-6)


def test_every_loss_has_an_oracle_and_a_default():
    assert set(TOKEN_LOSSES) == set(POLICY_LOSSES)
    assert set(PRESETS) == set(losses)
    assert set(CLIPPED_LOSSES) <= set(losses)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_loss_is_its_papers(case, name, options):
    config = GrpoConfig(**{"epsilon": 0.15, "loss_type": name, **options})
    aggregation = config.loss_settings.loss_aggregation
    ours = in_pieces(name, case, range(8), config, aggregation, micro_batch_size=3, max_tokens=None)
    assert_equal(ours, whole(name, case, range(8), config, aggregation))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
@settings(max_examples=5)
@given(
    rows=st.permutations(range(8)).flatmap(
        lambda order: st.integers(1, 8).map(lambda size: order[:size])
    ),
    num_shards=st.integers(1, 3),
    micro_batch_size=st.integers(1, 8),
    max_tokens=st.none() | st.integers(12, 40),
    multiple_of=st.sampled_from([1, 8]),
    options=st.sampled_from(sorted(OPTIONS)),
)
def test_micro_batches_ranks_and_packing_change_nothing(
    case, name, aggregation, rows, num_shards, micro_batch_size, max_tokens, multiple_of, options
):
    batch = case[0]
    if not batch.completion_mask[rows].any():
        return
    config = GrpoConfig(**{"epsilon": 0.15, "loss_type": name, **OPTIONS[options]})
    in_one = in_pieces(name, case, rows, config, aggregation, micro_batch_size=8, max_tokens=None)
    split = in_pieces(
        name,
        case,
        rows,
        config,
        aggregation,
        num_shards=num_shards,
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
        multiple_of=multiple_of,
    )
    assert_equal(split, in_one)
    assert split[2] == pytest.approx(in_one[2], rel=1e-5, abs=1e-6)
    if name in TOKEN_LOSSES:
        assert_equal(split, whole(name, case, rows, config, aggregation))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_every_loss_has_the_policy_gradient(case, name, aggregation):
    """-weight * A for each token: clipping, gates and sequence ratios change nothing there."""
    batch, logprobs, entropies = case
    on_policy = replace(batch, old_logprobs=logprobs), logprobs, entropies
    gradients = [
        in_pieces(
            name,
            on_policy,
            range(8),
            GrpoConfig(epsilon=epsilon, loss_type=name),
            aggregation,
            micro_batch_size=2,
            max_tokens=None,
        )[1][0]
        for epsilon in (1e-6, 0.2)
    ]
    weights = loss_weights(
        batch.completion_mask,
        aggregation=aggregation,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    expected = -weights * batch.advantages
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_completions_that_are_dropped_were_never_there(case, name, aggregation):
    batch, logprobs, entropies = case
    kept = torch.tensor([True, False, True, True, False, True, True, True])
    dropped = replace(
        batch,
        kept=kept,
        completion_mask=batch.completion_mask & kept[:, None],
        advantages=batch.advantages * kept[:, None],
    )
    config = GrpoConfig(epsilon=0.15, beta=0.1, loss_type=name)
    sizes = {"micro_batch_size": 3, "max_tokens": None}
    ours = in_pieces(name, (dropped, logprobs, entropies), range(8), config, aggregation, **sizes)
    rows = kept.nonzero().flatten().tolist()
    without = in_pieces(name, case, rows, config, aggregation, **sizes)
    assert_equal(ours, without)
    assert ours[2] == pytest.approx(without[2], rel=1e-5)


def test_the_case_above_has_everything_that_could_go_wrong(case):
    sizes = {"micro_batch_size": 8, "max_tokens": None}

    def metrics(name, options):
        config = GrpoConfig(**{"epsilon": 0.15, "loss_type": name, **OPTIONS[options]})
        return in_pieces(name, case, range(8), config, "token_mean", **sizes)[2]

    for name in ("grpo", "gspo"):
        clips = metrics(name, "plain")
        assert clips["clip_ratio/low_mean"] > 0
        assert clips["clip_ratio/high_mean"] > 0
    assert 0 < metrics("grpo", "delta")["clip_ratio/dual_mean"] < 1
    assert 0 < metrics("cispo", "plain")["cispo_clip_ratio"] < 1
    assert 0 < metrics("cispo", "lower clip")["cispo_clip_ratio_low"] < 1
    for name in ("gmpo", "dppo_tv", "dppo_kl"):
        clips = metrics(name, "plain" if name == "gmpo" else "divergence")
        assert 0 < clips["clip_ratio/low_mean"] < 1
        assert 0 < clips["clip_ratio/high_mean"] < 1
    assert metrics("grpo", "kl in reward")["kl"] > 0
    for options in ("token truncation", "sequence truncation", "truncation both ways"):
        assert 0 < metrics("grpo", options)["sampling/clipped_fraction"] < 1
    rejections = ["IcePop", "sequence rejection", "geometric rejection", "off-policy mask", "mask"]
    for options in (
        *rejections,
        "token k2",
        "mean k3",
        "sum k2",
        "maximal k3",
        "veto",
        "veto of the likelier",
    ):
        assert 0 < metrics("grpo", options)["sampling/masked_fraction"] < 1
        share = metrics("grpo", options)["sampling/importance_sampling_ratio/effective_sample_size"]
        assert 0 < share < 1
