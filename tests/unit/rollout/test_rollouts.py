"""Groups are scored and logged as they finish; waiting has an end; the order is restored.

With what runs ahead, test_rollouts_ahead.py begins.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_world import NEVER, TIMEOUT_S, World, make_prompts

from rlsys.actors.waiting import PhaseTimeout
from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.config import GrpoConfig
from rlsys.rollout.draws import sampling_seed
from rlsys.rollout.pipeline import POLL_S


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(sampling seconds, scoring seconds)` -> world, and rollouts of as many prompts."""
    folder = tmp_path_factory.mktemp("rollouts")

    def build(sampling, scoring, **fields):
        world = World(sampling.__getitem__, scoring.__getitem__)
        size = len(sampling)
        validation = make_prompts(size)
        rollouts = world.rollouts(
            folder, num_prompts=size, dataset_size=size, validation=validation, **fields
        )
        return world, rollouts

    return build


seconds = st.floats(0.0, TIMEOUT_S * 0.9)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6))
def test_whatever_finishes_when_the_groups_are_in_order_and_logged_once_each(build, times):
    sampling, scoring = zip(*times, strict=True)
    world, rollouts = build(sampling, scoring)
    world.version = 2
    groups = rollouts.next_batch(3)
    assert [group.prompt for group in groups] == make_prompts(len(times))
    assert [group.group_id for group in groups] == list(range(len(times)))
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
    world.version = 6
    with pytest.raises(PhaseTimeout) as caught:
        rollouts.next_batch(7)
    assert str(caught.value) == (
        "rollout engine 0: its stacks are in stacks.txt\n"
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


def test_engines_that_start_again_have_a_deadline_of_their_own(build):
    world, rollouts = build(sampling=[5 * TIMEOUT_S] * 2, scoring=[0.0] * 2)
    world.engines.back_at = world.now + 4.5 * TIMEOUT_S
    assert len(rollouts.next_batch(1)) == 2
    assert world.now == pytest.approx(100.0 + 5 * TIMEOUT_S)


def test_silent_engines_that_are_replaced_get_the_time_again(build):
    world, rollouts = build(sampling=[NEVER, 1.0], scoring=[0.0] * 2)
    world.engines.sampling_again_s = 0.9 * TIMEOUT_S
    assert len(rollouts.next_batch(1)) == 2
    (error,) = world.engines.replaced_after
    assert str(error).endswith("1 of 2 groups are done")
    assert world.now == pytest.approx(101.0 + 1.9 * TIMEOUT_S, abs=2 * POLL_S)


def test_prompts_come_from_the_data_and_are_sampled_as_configured(build):
    world, rollouts = build([0.0] * 3, [0.0] * 3)
    rollouts.next_batch(1)
    assert [request.prompt for request in world.engines.requests] == make_prompts(3)
    for request in world.engines.requests:
        assert (request.num_generations, request.temperature) == (2, 0.7)
    assert rollouts.metrics()["epoch"] == 1.0


def test_seeds_are_those_of_the_step_and_the_position(build):
    """What seeds of the first release were, so that its runs can be repeated."""
    world, rollouts = build([0.0] * 3, [0.0] * 3)
    for step in (1, 2):
        world.version = step - 1
        rollouts.next_batch(step)
    seeds = [request.seed for request in world.engines.requests]
    assert seeds == [sampling_seed(42, step, i) for step in (1, 2) for i in range(3)]
    assert len(set(seeds)) == 6
    world, rollouts = build([0.0] * 3, [0.0] * 3, rollout={"seed_per_request": False})
    rollouts.next_batch(1)
    assert {request.seed for request in world.engines.requests} == {None}


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
    requests = world.engines.requests
    assert [(r.num_generations, r.temperature) for r in requests] == [(1, 0.7)] * 3
    assert [r.seed for r in requests] == [sampling_seed(42, 0, i) for i in range(3)]
    assert metrics["eval/reward"] == pytest.approx((0 + 1 / 8 + 2 / 8) / 3)
    assert all(name.startswith("eval/") for name in metrics)
    logged = [
        (step, advantages, split) for _, step, _, advantages, split in world.tracker.completions
    ]
    assert logged == [(20, None, "eval")] * 3
    assert sorted(group.group_id for _, _, group, _, _ in world.tracker.completions) == [0, 1, 2]
