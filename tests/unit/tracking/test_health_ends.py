"""Warnings and ends of runs whose completions come from another policy, or that train nothing."""

import math

import pytest
from config_cases import values

from rlsys.config import Config
from rlsys.problems import TrainingStopped
from rlsys.tracking.health import Health, rules_of
from rlsys.tracking.health.update_rules import MAX_EMPTY_STEPS

DIFFERENCE, MASKED = "sampling/logp_difference/mean", "sampling/masked_fraction"


class Watch:
    """The health of a run, with warnings as texts; raises when the run has to end."""

    def __init__(self, config, dtype):
        self._health = Health(rules_of(config, dtype=dtype))
        self.nothing_learned = self._health.nothing_learned

    def observe(self, step, metrics):
        found = [warning.text for warning in self._health.observe(step, metrics)]
        self._health.raise_if_stopped()
        return found


def watch(dtype="float32", **sections):
    return Watch(Config.model_validate(values(**sections)), dtype)


def step_of(**metrics):
    return {"reward": 0.5, "num_loss_tokens": 100.0, "kl": 0.0} | metrics


@pytest.mark.parametrize(
    ("dtype", "difference", "warns"),
    [
        ("float32", 2e-5, False),
        ("float32", 2e-4, True),
        ("bfloat16", 0.05, False),
        ("bfloat16", 0.2, True),
        ("float32", math.nan, True),
    ],
)
def test_a_difference_that_rounding_does_not_explain_is_a_warning_once(dtype, difference, warns):
    metrics = step_of(**{DIFFERENCE: difference})
    looking = watch(dtype, grpo={"max_logp_difference": None})
    found = looking.observe(1, metrics)
    assert bool(found) == warns
    if warns:
        for word in ("step 1", DIFFERENCE, "config.json", "--canary"):
            assert word in found[0]
    assert looking.observe(2, metrics) == []


def test_engines_that_quantise_may_differ_by_more():
    def found(difference):
        quantised = watch("bfloat16", rollout={"generation_batch_size": 16, "quantization": "fp8"})
        return quantised.observe(1, step_of(**{DIFFERENCE: difference}))

    assert found(0.3) == []
    assert "rounding in FP8 explains 0.5" in found(0.6)[0]


def test_a_low_temperature_stretches_what_rounding_explains():
    metrics = step_of(**{DIFFERENCE: 3e-4})
    assert watch(rollout={"temperature": 0.1}).observe(1, metrics) == []
    assert watch(rollout={"temperature": 2.0}).observe(1, metrics) != []


@pytest.mark.parametrize("difference", [5.6, math.nan, math.inf])
def test_a_difference_above_the_bound_ends_the_run(difference):
    metrics = step_of(**{DIFFERENCE: difference})
    with pytest.raises(TrainingStopped, match=r"max_logp_difference = 1"):
        watch().observe(1, metrics)
    with pytest.raises(TrainingStopped, match="at step 7"):
        watch().observe(7, metrics)
    assert watch(grpo={"max_logp_difference": None}).observe(1, metrics) != []


def test_stale_completions_are_not_compared():
    """Their log-probs differ by what was learned since."""
    looking = watch(rollout={"max_staleness": 1})
    stale, fresh = {"staleness/max": 1.0}, {"staleness/max": 0.0}
    assert looking.observe(1, step_of(**{DIFFERENCE: 1e-6}, **fresh)) == []
    assert looking.observe(2, step_of(**{DIFFERENCE: 2.0}, **stale)) == []
    with pytest.raises(TrainingStopped, match="nats per token"):
        looking.observe(3, step_of(**{DIFFERENCE: 2.0}, **fresh))


@pytest.mark.parametrize(
    ("step", "sections", "warns"),
    [
        (1, {}, True),
        (2, {}, False),
        (1, {"reference": {"path": "another"}}, False),
        (1, {"grpo": {"beta": 0.1, "num_iterations": 2}}, False),
    ],
)
def test_a_reference_that_is_not_the_policys_twin(step, sections, warns):
    looking = watch(**({"grpo": {"beta": 0.1}} | sections))
    found = looking.observe(step, step_of(kl=1e-3))
    assert bool(found) == warns


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({MASKED: 1.0, DIFFERENCE: 1e-5}, ["rollout_rs = sequence", "100.0%"]),
        ({MASKED: 0.986, DIFFERENCE: 1e-5}, ["98.6%"]),
        ({"num_loss_tokens": 0.0}, ["max_completion_length = 64"]),
    ],
)
def test_steps_that_train_nothing_warn_and_several_end_the_run(metrics, words):
    grpo = {"rollout_rs": "sequence", "mask_truncated_completions": True}
    looking = watch(grpo=grpo)
    (warning,) = looking.observe(1, step_of(**metrics))
    for word in words:
        assert word in warning
    for step in range(2, MAX_EMPTY_STEPS):
        assert looking.observe(step, step_of(**metrics)) == []
    with pytest.raises(TrainingStopped, match=f"{MAX_EMPTY_STEPS} steps in a row trained nothing"):
        looking.observe(MAX_EMPTY_STEPS, step_of(**metrics))


@pytest.mark.parametrize(
    ("grpo", "named"),
    [
        ({"rollout_is": "sequence_mask"}, "grpo.rollout_is = sequence_mask left"),
        ({"rollout_token_veto_threshold": 0.5}, "grpo.rollout_token_veto_threshold = 0.5 left"),
        (
            {"rollout_rs": "token", "off_policy_mask_threshold": 0.1},
            "grpo.rollout_rs = token and grpo.off_policy_mask_threshold = 0.1 left",
        ),
    ],
)
def test_a_masked_step_names_what_masks(grpo, named):
    (warning,) = watch(grpo=grpo).observe(1, step_of(**{MASKED: 1.0}))
    assert named in warning
    assert "None" not in warning


def test_a_step_that_trains_starts_the_count_again():
    looking = watch(grpo={"rollout_rs": "sequence"})
    for step in range(1, 12):
        looking.observe(step, step_of(**{MASKED: 0.1 if step % 3 == 0 else 1.0}))


def test_steps_without_rewards_do_not_end_the_run():
    tracking = {"health": {"no_reward": False}}
    looking = watch(reward={"reward_funcs": ["format"], "on_error": "drop"}, tracking=tracking)
    for step in range(1, 9):
        assert looking.observe(step, step_of(reward=math.nan, num_loss_tokens=0.0)) == []


@pytest.mark.parametrize(
    ("advantages", "is_said"), [((0.0, 0.0), True), ((0.0, 0.7), False), ((0.7, 0.0), False)]
)
def test_a_run_without_different_rewards_says_at_its_end_that_nothing_was_learned(
    advantages, is_said
):
    looking = watch()
    assert looking.nothing_learned() is None  # it took no step
    for step, size in enumerate(advantages, start=3):
        looking.observe(step, step_of(**{"advantages/abs_max": size}))
    text = looking.nothing_learned()
    assert (text is not None) == is_said
    if text is not None:
        assert "nothing was learned from rewards: in no step from 3 to 4" in text
        assert "rlsys completions" in text
