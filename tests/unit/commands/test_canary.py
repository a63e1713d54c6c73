"""A run with learning rate 0 that changes anything is found out."""

import pytest
from config_cases import write_config

from rlsys.commands.canary import STEPS, Recorder, canary_config, judge
from rlsys.config.load import load_config

HEALTHY = {
    "loss": 0.1,
    "kl": 0.0,
    "ratio/mean": 1.0,
    "clip_ratio/region_mean": 0.0,
    "sampling/kl": 3e-9,
}
TOKENS = {"a:1": [[1, 2, 3]], "a:2": [[4, 5]], "a:3": [[6]]}


@pytest.fixture
def config(tmp_path):
    return canary_config(load_config(write_config(tmp_path)).config)


def failures(config, *, on_cpu=True, after=TOKENS, **metrics):
    recorder = Recorder()
    recorder.log_metrics(0, {"eval/reward": 1.0})
    recorder.log_metrics(1, HEALTHY)
    recorder.log_metrics(2, HEALTHY | metrics)
    recorder.held_out = {0: TOKENS, STEPS: after}
    return [check.what for check in judge(config, recorder, on_cpu=on_cpu) if not check.passed]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_healthy_system_passes(config, on_cpu):
    assert failures(config, on_cpu=on_cpu) == []


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["kl", "ratio/mean", "clip_ratio/region_mean", "sampling/kl"])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_each_statistic_that_moves_is_found(config, on_cpu, name, value):
    (what,) = failures(config, on_cpu=on_cpu, **{name: value})
    assert name in what or "clipped" in what


def test_completions_that_change_are_found(config):
    (what,) = failures(config, after=TOKENS | {"a:2": [[4, 7]]})
    assert "held-out completions" in what


def test_a_few_may_change_on_gpus_but_not_most(config):
    assert failures(config, on_cpu=False, after=TOKENS | {"a:2": [[4, 7]]}) == []
    other = {prompt_id: [[9]] for prompt_id in TOKENS}
    assert len(failures(config, on_cpu=False, after=other)) == 1


def test_the_canary_trains_nothing_and_evaluates_around_its_steps(config):
    assert config.policy.lr == config.policy.min_lr == 0
    assert config.eval_steps == config.max_steps == STEPS
    assert config.checkpoint.save_steps is None
