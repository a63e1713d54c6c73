"""Combinations of the algorithm that mean nothing are refused with a reason."""

import re

import pytest
from config_cases import values
from pydantic import ValidationError

from rlsys.algo.advantages import advantage_estimators
from rlsys.algo.losses import losses
from rlsys.config import Config
from rlsys.config.algorithm import ADVANTAGE_ESTIMATORS, PRESETS
from rlsys.preflight.checks import check_run


def config(grpo, **sections):
    return Config.model_validate(values(grpo=grpo, **sections))


def problems(grpo, **sections):
    try:
        config(grpo, **sections)
    except ValidationError as error:
        (detail,) = error.errors()
        return [problem.text for problem in detail["ctx"]["error"].problems]
    return []


@pytest.mark.parametrize(
    ("grpo", "reason"),
    [
        ({"loss_type": "gsop"}, "Did you mean 'gspo'"),
        ({"loss_type": "GRPO"}, "Did you mean 'grpo'"),
        ({"loss_type": "ppo"}, "Did you mean 'grpo'? Known: grpo, bnpo,"),
        ({"loss_type": "geo_mean"}, "Did you mean 'gmpo'"),
        ({"loss_type": "x"}, "kl_cov, reinforce. For one of your own"),  # sft is for warm starts
        ({"advantage_estimator": "rlo"}, "Did you mean 'rloo'"),
        ({"loss_type": "sft"}, "imitates"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "cispo, sapo, not for"),
        ({"loss_type": "reinforce", "delta": 3.0}, "dppo_kl, not for reinforce"),
        ({"loss_type": "sapo", "epsilon_high": 0.28}, "epsilon_high = 0.28 is for grpo.loss_type"),
        ({"vespo_k_pos": 1.0}, "vespo_k_pos = 1.0 is for grpo.loss_type vespo, not for grpo"),
        ({"loss_type": "clip_cov", "ppo_kl_coef": 2.0}, "kl_cov, not for clip_cov"),
        ({"loss_type": "clip_cov", "clip_cov_lb": 6.0}, "no token is between"),
        ({"loss_type": "vespo", "rollout_is": "sequence_mask"}, "use rollout_is token"),
        (
            {"advantage_estimator": "maxrl", "scale_rewards": "batch"},
            "scale_rewards = batch has no",
        ),
        ({"advantage_estimator": "maxrl", "kl_in_reward": True}, "kl_in_reward = true has no"),
        ({"epsilon_low": 1.5}, "epsilon_low = 1.5"),
        ({"rollout_is_threshold_lower": 2.0}, "not below rollout_is_threshold = 2"),
        ({"rollout_rs": "seq_mean_k3"}, "needs grpo.rollout_rs_threshold"),
        (
            {
                "rollout_rs": "token_k2",
                "rollout_rs_threshold": 0.1,
                "rollout_rs_threshold_lower": 0.0,
            },
            "an upper bound only",
        ),
        ({"rollout_rs": "token", "rollout_rs_threshold": 0.9}, "their weight is 1"),
        ({"delta": 1.1}, "clip bound of 1.2"),
        ({"loss_type": "dual_clip", "epsilon_high": 2.5}, "delta = 3"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "mean 0"),
        ({"beta": 0.1, "kl_in_reward": True, "use_bias_correction_kl": True}, "in the reward"),
        (
            {
                "multi_objective_aggregation": "normalize_then_sum",
                "beta": 0.1,
                "kl_in_reward": True,
            },
            "never compares",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "use auto",
        ),
        (
            {
                "multi_objective_aggregation": "normalize_then_sum",
                "advantage_estimator": "rloo",
            },
            "use advantage_estimator grpo",
        ),
        (
            {"advantage_estimator": "reinforce_plus_plus", "scale_rewards": "group"},
            "use auto",
        ),
        ({"old_logprobs": "rollout", "rollout_is": "token"}, "is 1"),
        ({"old_logprobs": "rollout", "rollout_rs": "geometric"}, "is 1"),
        ({"old_logprobs": "rollout", "rollout_token_veto_threshold": 1e-4}, "is 1"),
        ({"old_logprobs": "rollout", "top_entropy_quantile": 0.2}, "entropies"),
        ({"loss_type": "reinforce", "num_iterations": 2}, "off-policy"),
    ],
    ids=str,
)
def test_combinations_that_mean_nothing_are_refused_with_a_reason_and_a_remedy(grpo, reason):
    (text,) = problems(grpo)
    assert reason in text
    assert re.search(r"\b(use|leave|make|put|set|name)\b", text), "no remedy"
    assert any(f"grpo.{field}" in text for field in grpo)


@pytest.mark.parametrize(
    "grpo",
    [
        {"kl_estimator": "k1", "kl_in_reward": True},  # without beta neither does anything
        {"beta": 0.1, "kl_estimator": "k1", "kl_in_reward": True},
        {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": True},
        {"importance_sampling_level": "sequence"},
        {"loss_type": "gspo", "importance_sampling_level": "sequence_token"},
        {"loss_type": "luspo"},
        {"loss_type": "luspo", "loss_aggregation": "token_mean"},
        {"loss_type": "gmpo", "loss_aggregation": "token_mean"},
        {"loss_type": "cispo", "importance_sampling_level": "sequence"},
        {"loss_type": "gmpo", "epsilon": 1.5},
        {"loss_type": "dppo_kl", "epsilon": 0.05, "old_logprobs": "rollout"},
        {"loss_type": "vespo", "rollout_is": "token_mask"},
        {"rollout_rs": "seq_max_k2", "rollout_rs_threshold": 0.3},
        {"loss_type": "mine", "external_plugins": ["mine.py"], "loss_aggregation": "token_mean"},
        {"old_logprobs": "rollout", "num_iterations": 3},
    ],
    ids=str,
)
def test_others_are_not(grpo):
    assert problems(grpo) == []


def test_the_names_are_those_of_the_registries():
    assert set(ADVANTAGE_ESTIMATORS) == set(advantage_estimators)
    assert set(PRESETS) == set(losses)


@pytest.mark.parametrize(
    ("grpo", "settings"),
    [
        ({"loss_type": "gspo"}, ("seq_mean_token_mean", "sequence", None)),
        (
            {"loss_type": "gspo", "importance_sampling_level": "token"},
            ("seq_mean_token_mean", "token", None),
        ),
        (
            {"loss_type": "gspo", "loss_aggregation": "token_mean"},
            ("token_mean", "sequence", None),
        ),
        (
            {"loss_type": "dapo", "importance_sampling_level": "sequence"},
            ("token_mean", "sequence", None),
        ),
        ({"loss_type": "dual_clip"}, ("seq_mean_token_mean", "token", 3.0)),
        ({"loss_type": "dual_clip", "delta": 2.0}, ("seq_mean_token_mean", "token", 2.0)),
        (
            {"loss_type": "mine", "external_plugins": ["mine.py"], "delta": 2.0},
            ("seq_mean_token_mean", "token", 2.0),
        ),
    ],
    ids=str,
)
def test_a_field_that_is_set_wins_over_the_preset_of_the_loss(grpo, settings):
    assert config(grpo).grpo.loss_settings == settings


@pytest.mark.parametrize(
    ("grpo", "needed"),
    [
        ({}, False),
        ({"old_logprobs": "recompute"}, True),
        ({"num_iterations": 2}, True),
        ({"num_iterations": 2, "old_logprobs": "rollout"}, False),
        ({"beta": 0.1, "kl_in_reward": True}, True),
        ({"kl_in_reward": True}, False),
        ({"top_entropy_quantile": 0.5}, True),
    ],
    ids=str,
)
def test_old_logprobs_are_computed_only_where_they_matter(grpo, needed):
    assert config(grpo).recompute_old_logprobs == needed


PLUGIN = """
from rlsys.algo.losses import policy_loss, register_loss

@register_loss("loss-of-a-plugin")
def mine(inputs, config):
    return policy_loss(inputs, config, -inputs.advantages * inputs.logprobs)
"""


def test_a_plugin_may_bring_a_loss(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    grpo = {"external_plugins": [str(file)], "loss_type": "loss-of-a-plugin"}
    texts = [str(problem) for problem in check_run(config(grpo))]
    try:
        assert not [text for text in texts if text.startswith("grpo")]
        assert "loss-of-a-plugin" in losses
        unknown = config(grpo | {"loss_type": "loss-of-the-plugin"})
        (text,) = [str(p) for p in check_run(unknown) if str(p).startswith("grpo")]
        assert "Did you mean 'loss-of-a-plugin'" in text
        assert "sft" not in text
        assert "sft" in losses
    finally:
        del losses["loss-of-a-plugin"]


def test_auto_corrects_where_samples_are_stale_or_quantised():
    def corrects(grpo=None, **rollout):
        mine = config(grpo or {}, rollout={"generation_batch_size": 16, **rollout})
        return mine.algorithm.rollout_is

    assert corrects() == "none"
    assert corrects(max_staleness=1) == "token"
    assert corrects(quantization="fp8") == "token"
    assert corrects({"rollout_is": "none"}, quantization="fp8") == "none"
    # The ratio is that of the policy and the quantised engine then.
    assert corrects({"old_logprobs": "rollout"}, quantization="fp8") == "none"
