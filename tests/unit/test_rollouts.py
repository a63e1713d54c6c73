"""Groups are scored and logged as they finish; waiting has an end; the order is restored.

Engines and reward workers are played by a world whose time passes only while somebody waits.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from algo_cases import make_groups
from hypothesis import given
from hypothesis import strategies as st
from tracking_cases import make_config

from rlsys import rollouts as rollouts_module
from rlsys.actors.group import PhaseTimeout
from rlsys.algo.advantages import compute_advantages, rewards_matrix
from rlsys.algo.batching import build_train_batch
from rlsys.config import GrpoConfig
from rlsys.prompt_source import PromptSource
from rlsys.rollouts import POLL_S, Rollouts
from rlsys.tracking.base import Tracker

NEVER = float("inf")
TIMEOUT_S = 20.0


class Work:
    """Things that are done at known times: what engines and reward workers have in common."""

    def __init__(self, world, seconds):
        self.world = world
        self.seconds = seconds
        self.done_at = {}

    def begin(self, group):
        self.done_at[group.group_id] = self.world.now + self.seconds[group.group_id], group

    @property
    def num_pending(self):
        return len(self.done_at)

    def pending_refs(self):
        return [time for time, _ in self.done_at.values()]

    def collect(self):
        ready = [i for i, (time, _) in self.done_at.items() if time <= self.world.now]
        return [self.done_at.pop(i)[1] for i in ready]


class Engines(Work):
    """Samples group i within `seconds[i]`."""

    def submit(self, prompts, **request):
        self.request = request
        lengths = [[2 + i, 3] for i in range(len(prompts))]
        self.groups = make_groups(lengths) if prompts else []
        if request["num_generations"] == 1:
            self.groups = [
                replace(group, completions=group.completions[:1], rewards=group.rewards[:1])
                for group in self.groups
            ]
        for group in self.groups:
            self.begin(replace(group, rewards=[]))


class Rewards(Work):
    """Scores group i within `seconds[i]`, any number at a time."""

    def submit(self, group):
        assert group.rewards == []
        self.begin(self.world.engines.groups[group.group_id])


class Log(Tracker):
    def __init__(self, world):
        self.world = world
        self.completions = []

    def log_completions(self, step, group, advantages, split="train"):
        self.completions.append((self.world.now, step, group, advantages, split))

    def close(self):
        raise AssertionError("trackers are closed by whoever built them")


class World:
    def __init__(self, sampling, scoring):
        self.now = 100.0
        self.engines = Engines(self, sampling)
        self.rewards = Rewards(self, scoring)
        self.tracker = Log(self)

    def wait(self, refs, timeout):
        assert 0 < timeout <= POLL_S
        self.now = max(self.now, min([self.now + timeout, *refs]))

    def rollouts(self, tmp_path, **fields):
        num_prompts = len(self.engines.seconds)
        rollout = {
            "generation_batch_size": 2 * num_prompts,
            "num_generations": 2,
            "timeout_s": TIMEOUT_S,
            "temperature": 0.7,
        }
        prompts = [group.prompt for group in make_groups([[1, 1]] * num_prompts)]
        return Rollouts(
            make_config(tmp_path, rollout=rollout, **fields),
            engines=self.engines,
            rewards=self.rewards,
            prompts=PromptSource(prompts, shuffle=False, seed=0),
            validation=prompts,
            tracker=self.tracker,
        )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(sampling seconds, scoring seconds)` -> world, rollouts."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("rollouts")

        def build(sampling, scoring, **fields):
            world = World(sampling, scoring)
            patch.setattr(rollouts_module, "ray", SimpleNamespace(wait=world.wait))
            patch.setattr(rollouts_module, "time", SimpleNamespace(monotonic=lambda: world.now))
            return world, world.rollouts(folder, **fields)

        yield build


seconds = st.floats(0.0, TIMEOUT_S * 0.9)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6))
def test_whatever_finishes_when_the_groups_are_in_order_and_logged_once_each(build, times):
    sampling, scoring = zip(*times, strict=True)
    world, rollouts = build(sampling, scoring)
    groups = rollouts.next_batch(3)
    assert groups == world.engines.groups
    logged = {group.group_id: group for _, _, group, _, _ in world.tracker.completions}
    assert len(world.tracker.completions) == len(groups)
    assert [logged[i] for i in range(len(groups))] == groups
    for now, step, group, _, split in world.tracker.completions:
        assert now == pytest.approx(100.0 + sampling[group.group_id] + scoring[group.group_id])
        assert (step, split) == (3, "train")


def test_a_group_is_logged_while_others_are_still_sampled(build):
    world, rollouts = build(sampling=[15.0, 1.0, 6.0], scoring=[0.5, 0.5, 0.5])
    rollouts.next_batch(1)
    logged = [(now, group.group_id) for now, _, group, _, _ in world.tracker.completions]
    assert logged == [(101.5, 1), (106.5, 2), (115.5, 0)]


def test_engines_that_stop_giving_groups_are_an_error_with_the_numbers(build):
    world, rollouts = build(sampling=[1.0, NEVER, 4.0, NEVER], scoring=[1.0] * 4)
    with pytest.raises(PhaseTimeout) as caught:
        rollouts.next_batch(7)
    assert str(caught.value) == (
        "rollout of step 7: no group finished within rollout.timeout_s = 20 s; "
        "2 of 4 groups are done"
    )
    assert 105.0 + TIMEOUT_S <= world.now <= 105.0 + TIMEOUT_S + 2 * POLL_S


def test_the_deadline_is_for_the_next_group_and_not_for_all(build):
    world, rollouts = build(sampling=[19.0, 38.0, 57.0], scoring=[0.0] * 3)
    assert len(rollouts.next_batch(1)) == 3
    assert world.now == pytest.approx(157.0)


def test_slow_rewards_do_not_count_as_slow_sampling(build):
    world, rollouts = build(sampling=[1.0, 2.0], scoring=[10 * TIMEOUT_S] * 2)
    assert len(rollouts.next_batch(1)) == 2
    assert world.now == pytest.approx(302.0)


def test_prompts_come_from_the_data_and_are_sampled_as_configured(build):
    world, rollouts = build([0.0] * 3, [0.0] * 3)
    rollouts.next_batch(5)
    assert world.engines.request == {"step": 5, "num_generations": 2, "temperature": 0.7}
    assert rollouts.epoch == 1.0


@pytest.mark.parametrize("scale_rewards", ["auto", "group", "none"])
def test_logged_advantages_are_those_that_the_driver_computes(build, scale_rewards):
    world, rollouts = build([0.0] * 4, [0.0] * 4, grpo={"scale_rewards": scale_rewards})
    groups = rollouts.next_batch(1)
    batch = build_train_batch(groups)
    config = GrpoConfig(scale_rewards=scale_rewards)
    advantages_NS = compute_advantages(groups, batch, config, None)
    # The last token of a row is one of its completion's.
    last_N = advantages_NS[torch.arange(len(groups) * 2), batch.lengths - 1]
    expected = last_N.view(-1, 2)
    for _, _, group, advantages, _ in world.tracker.completions:
        assert advantages == expected[group.group_id].tolist()
    assert expected.abs().max() > 0


def test_advantages_that_depend_on_groups_to_come_are_not_logged(build):
    world, rollouts = build([0.0] * 2, [0.0] * 2, grpo={"scale_rewards": "batch"})
    rollouts.next_batch(1)
    assert [advantages for _, _, _, advantages, _ in world.tracker.completions] == [None, None]


def test_evaluations_differ_by_the_weights_alone(build):
    """One completion a prompt, with seeds that do not depend on the step."""
    world, rollouts = build([0.0] * 3, [0.0] * 3)
    metrics = rollouts.evaluate(20)
    assert world.engines.request == {"step": 0, "num_generations": 1, "temperature": 0.7}
    rewards = rewards_matrix(world.engines.groups)
    assert metrics["eval/reward"] == pytest.approx(rewards.mean().item())
    assert all(name.startswith("eval/") for name in metrics)
    logged = [
        (step, advantages, split) for _, step, _, advantages, split in world.tracker.completions
    ]
    assert logged == [(20, None, "eval")] * 3
