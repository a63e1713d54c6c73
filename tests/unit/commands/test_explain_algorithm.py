"""`rlsys explain` says which algorithm a config amounts to."""

import itertools
from typing import get_args

import pytest
from config_cases import values
from pydantic import ValidationError

from rlsys.algo.advantages import advantage_estimators
from rlsys.algo.losses import losses
from rlsys.commands.explain_algorithm import RECIPES, describe_algorithm
from rlsys.config import Config
from rlsys.config.algorithm import ADVANTAGE_ESTIMATORS, PRESETS, Aggregation


def config(grpo):
    return Config.model_validate(values(grpo=grpo))


def is_refused(grpo):
    try:
        config(grpo)
    except ValidationError:
        return True
    return False


def test_every_built_in_combination_is_described_or_refused():
    described = 0
    for loss, estimator, aggregation in itertools.product(
        PRESETS, ADVANTAGE_ESTIMATORS, [None, *get_args(Aggregation)]
    ):
        grpo = {
            "loss_type": loss,
            "advantage_estimator": estimator,
            "loss_aggregation": aggregation,
        }
        if not is_refused(grpo):
            parts = dict(describe_algorithm(config(grpo)))
            assert parts["loss"].startswith(loss)
            assert (aggregation or PRESETS[loss].loss_aggregation) in parts["loss"]
            described += 1
    assert described > 150


def test_a_description_worked():
    parts = dict(
        describe_algorithm(
            config(
                {
                    "loss_type": "dapo",
                    "epsilon_high": 0.28,
                    "beta": 0.04,
                    "rollout_is": "token",
                    "rollout_rs": "geometric",
                    "rollout_rs_threshold": 1.25,
                    "top_entropy_quantile": 0.2,
                    "mask_truncated_completions": True,
                }
            )
        )
    )
    assert parts == {
        "algorithm": "DAPO",
        "advantages": "reward less the mean of its group, / (std of the group + 0.0001); "
        "completions cut at the length limit are not trained on",
        "loss": "dapo: ratio of the token, clipped to [0.8, 1.28]; token_mean; only the 20% of "
        "tokens with the highest entropy",
        "KL to the reference": "0.04 x k3, added to the loss",
        "old_logprobs": "computed by the policy before the update, a forward pass",
        "off-policy correction": "weight old policy / rollout engine of the token, at most 2; a "
        "completion whose weight (geometric mean) is outside [0.8, 1.25] is left out",
    }


@pytest.mark.parametrize(
    ("grpo", "part", "text"),
    [
        (
            {"loss_type": "cispo", "epsilon_low": 0.5, "importance_sampling_level": "sequence"},
            "loss",
            "cispo: weight of each sequence at least 0.5, at most 1.2; token_mean",
        ),
        (
            {"loss_type": "gspo", "importance_sampling_level": "token", "delta": 4.0},
            "loss",
            "ratio of the token, clipped to [0.8, 1.2] and at 4 for bad ones; seq_mean_token_mean",
        ),
        ({"loss_type": "gmpo", "epsilon": 0.4}, "loss", "ratios clipped to [exp(-0.4), exp(0.4)]"),
        (
            {"loss_type": "dppo_tv", "epsilon_high": 0.15},
            "loss",
            "left out where its probability went up by 0.15 or down by 0.2; ratio at most 20",
        ),
        ({"loss_type": "vespo"}, "loss", "k 2 and lambda 3 for good ones, 3 and 2 for bad ones"),
        (
            {"loss_type": "clip_cov"},
            "loss",
            "without 0.0002 of the tokens, drawn at covariance 1",
        ),
        ({"loss_type": "kl_cov"}, "loss", "1 x abs(log ratio) for the 0.0002 of tokens"),
        ({"advantage_estimator": "maxrl", "loss_type": "dapo"}, "algorithm", "MaxRL"),
        ({"advantage_estimator": "maxrl"}, "advantages", "less the mean of its group, / that mean"),
        (
            {"rollout_is": "sequence_mask", "rollout_is_threshold": 3.0},
            "off-policy correction",
            "weight old policy / rollout engine of the sequence, at most 3, 0 beyond",
        ),
        (
            {"rollout_is": "token", "rollout_is_threshold_lower": 0.5},
            "off-policy correction",
            "of the token, at least 0.5, at most 2",
        ),
        (
            {
                "rollout_rs": "seq_max_k3",
                "rollout_rs_threshold": 0.1,
                "rollout_token_veto_threshold": 1e-4,
                "rollout_token_veto_threshold_high": 100.0,
            },
            "off-policy correction",
            "a completion whose seq_max_k3 is above 0.1 is left out; a completion with a token of "
            "weight below 0.0001 is left out; a completion with a token of weight above 100 is",
        ),
    ],
    ids=str,
)
def test_parts_of_a_description(grpo, part, text):
    assert text in dict(describe_algorithm(config(grpo)))[part]


def test_recipes_name_what_is_registered():
    assert {estimator for estimator, _ in RECIPES} <= set(advantage_estimators)
    assert {loss for _, loss in RECIPES} <= set(losses)
