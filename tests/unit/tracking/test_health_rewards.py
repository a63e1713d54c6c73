"""Warnings of dead rewards and reward hacking: when they come, and when they do not."""

import random
from pathlib import Path

import pytest
from tracking_cases import make_config

from rlsys.driver import log
from rlsys.tracking import build_tracker
from rlsys.tracking.health import Health, rules_of

DEAD_STEPS = 20
"""The default of tracking.health.dead_reward."""


class RewardWatch:
    """The health of a run with these reward functions, with warnings as texts."""

    def __init__(self, names, completions=None):
        config = make_config(Path("run"), reward={"reward_funcs": names})
        self._health = Health(rules_of(config, dtype="float32", completions=completions))

    def observe(self, step, metrics):
        return [warning.text for warning in self._health.observe(step, metrics)]


def step_metrics(reward: float = 1.0, **means: tuple[float, float]) -> dict[str, float]:
    metrics = {"reward": reward}
    for name, (mean, std) in means.items():
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    return metrics


def evaluation(accuracy: float, count: int = 400) -> dict[str, float]:
    std = (accuracy * (1 - accuracy)) ** 0.5
    return {
        "eval/rewards/accuracy/mean": accuracy,
        "eval/rewards/accuracy/std": std,
        "eval/num_completion_tokens": 50.0 * count,
        "eval/completions/mean_length": 50.0,
    }


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_equal_rewards_are_a_warning_unless_a_teacher_tells_tokens_apart(coef):
    taught = {"grpo": {"opd_kl_coef": coef}, "teacher": {"path": "org/teacher" if coef else None}}
    config = make_config(Path("run"), **taught)
    names = {rule.name for rule in rules_of(config, dtype="float32")}
    assert ("all_alike_groups" in names) == (coef == 0)


def test_a_constant_reward_is_a_warning_once_and_by_name():
    watch = RewardWatch(["accuracy", "format"])
    warnings = []
    for step in range(1, 3 * DEAD_STEPS):
        new = watch.observe(step, step_metrics(accuracy=(0.5, 0.5), format=(0.0, 0.0)))
        assert not new or step == DEAD_STEPS
        warnings += new
    [warning] = warnings
    assert "'format' gave 0 to every completion of the last 20 steps" in warning


def test_a_warning_names_the_whole_command():
    watch = RewardWatch(["a.py:f g"], Path("my runs/1/completions.jsonl"))
    for step in range(1, DEAD_STEPS + 1):
        warnings = watch.observe(step, step_metrics(**{"a.py:f g": (0.0, 0.0)}))
    command = "`rlsys rewards try 'a.py:f g' --completions 'my runs/1/completions.jsonl'`"
    assert command in warnings[0]
    [warning] = watch.observe(99, {"reward": float("nan")})
    assert "`rlsys rewards try --completions 'my runs/1/completions.jsonl'`" in warning


def test_a_step_without_any_reward_is_a_warning_once():
    watch = RewardWatch(["format"])
    nothing = {"reward": float("nan"), "rewards/format/mean": float("nan")}
    [warning] = watch.observe(3, nothing)
    assert "no completion of step 3 has a reward" in warning
    assert watch.observe(4, nothing) == []
    assert watch.observe(5, step_metrics(format=(0.5, 0.5))) == []


@pytest.mark.parametrize("alive", [(0.0, 0.1), (1.0, 0.0)])
def test_a_reward_that_changes_now_and_then_is_alive(alive):
    watch = RewardWatch(["format"])
    for step in range(1, 100):
        dead = (0.0, 0.0) if step % DEAD_STEPS else alive
        assert watch.observe(step, step_metrics(format=dead)) == []


def run(rewards, accuracies, count: int = 400) -> list[str]:
    """Warnings of a run with an evaluation every ten steps."""
    watch = RewardWatch(["format", "accuracy"])
    warnings = watch.observe(0, evaluation(accuracies[0], count))
    for step, reward in enumerate(rewards, start=1):
        warnings += watch.observe(step, step_metrics(reward))
        if step % 10 == 0:
            warnings += watch.observe(step, evaluation(accuracies[step // 10], count))
    return warnings


RISING = [1 + 0.02 * step + 0.05 * (-1) ** step for step in range(50)]


def test_a_rising_reward_with_a_falling_accuracy_is_a_warning_once():
    [warning] = run(RISING, [0.5, 0.7, 0.65, 0.4, 0.3, 0.2])
    assert "held-out 'accuracy' has fallen from 0.7 to 0.3" in warning


@pytest.mark.parametrize(
    ("rewards", "accuracies", "count"),
    [
        (RISING, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 400),  # both rise
        (RISING[::-1], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2], 400),  # both fall: it just goes badly
        (RISING, [0.5, 0.5, 0.5, 0.2, 0.5, 0.5], 400),  # one bad evaluation
        (RISING, [0.5, 0.52, 0.47, 0.46, 0.47, 0.46], 400),  # within the noise
        (RISING, [0.5, 0.7, 0.6, 0.5, 0.5, 0.5], 8),  # too few prompts to tell
    ],
)
def test_no_warning_without_a_reason(rewards, accuracies, count):
    assert run(rewards, accuracies, count) == []


def test_noise_alone_is_hardly_ever_a_warning():
    random.seed(0)
    warned = 0
    for _ in range(200):
        rewards = [random.gauss(1, 0.1) for _ in range(50)]
        hits = [sum(random.random() < 0.5 for _ in range(400)) / 400 for _ in range(6)]
        warned += bool(run(rewards, hits))
    assert warned <= 4


def test_the_console_prints_a_warning_of_the_run(tmp_path, capsys):
    tracker = build_tracker(make_config(tmp_path / "run"))
    config = make_config(tmp_path / "run", reward={"reward_funcs": ["format", "accuracy"]})
    health = Health(rules_of(config, dtype="float32"))
    for step in range(1, 30):
        log(tracker, health, step, step_metrics(format=(1.0, 0.0)))
    tracker.close()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning, step 20: reward function 'format' gave 1 to every")
