"""Rollouts that run ahead, oversample or filter: nothing too stale, nothing lost, nothing twice."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_world import NEVER, World, make_prompts, number_of

from rlsys.actors.recovery import Restarts
from rlsys.actors.waiting import PhaseTimeout
from rlsys.driver import train
from rlsys.rollout.rollouts import has_zero_std
from rlsys.timeline.spans import Timeline
from rlsys.tracking.health import Health, rules_of
from rlsys.types import DraftCounts, UpdateOutput

DATASET_SIZE = 2000


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build(world, num_prompts=P, ...)` -> rollouts in that world."""
    folder = tmp_path_factory.mktemp("rollouts")

    def build(world, *, num_prompts, **fields):
        fields = {"rollout": fields} if "rollout" not in fields else fields
        return world.rollouts(folder, num_prompts=num_prompts, dataset_size=DATASET_SIZE, **fields)

    return build


def steps(world, rollouts, first, last, *, update_seconds=1.0, evaluated=()):
    """The batches of steps, with updates that take some time and weight syncs that take none.

    What is `evaluated` is so before the step of that number.
    """
    for step in range(first, last + 1):
        world.publish(step - 1)
        if step in evaluated:
            rollouts.evaluate(step - 1)
        yield rollouts.next_batch(step)
        world.pass_seconds(update_seconds)


def numbers(groups):
    """Of the prompts; the stream is not shuffled, so they are its places."""
    return [number_of(group.prompt) for group in groups]


def staleness_of(step, group):
    return max(step - 1 - completion.policy_versions[0] for completion in group.completions)


seconds = st.floats(0.0, 15.0)


@st.composite
def worlds(draw):
    """A world with P, k, x, filter and durations of prompts that repeat."""
    num_prompts = draw(st.integers(1, 4))
    max_staleness = draw(st.integers(0, 3))
    most = max_staleness * num_prompts if max_staleness else 5
    rollout = {
        "max_staleness": max_staleness,
        "oversample_prompts": draw(
            st.one_of(st.none(), st.integers(1 if max_staleness else 0, most))
        ),
        "dynamic_sample": draw(st.booleans()),
    }
    if rollout["dynamic_sample"]:
        rollout["max_resample_times"] = draw(st.integers(1, 3))
    sampling = draw(st.lists(seconds, min_size=1, max_size=12))
    scoring = draw(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=5))
    flat = draw(st.lists(st.booleans(), min_size=1, max_size=7))
    world = World(
        sampling=lambda number: sampling[number % len(sampling)],
        scoring=lambda number: scoring[number % len(scoring)],
        flat=lambda number: flat[number % len(flat)],
    )
    return world, num_prompts, rollout, draw(seconds)


@given(worlds(), st.sets(st.integers(1, 6)))
def test_batches_are_full_and_fresh_and_no_prompt_is_lost_or_used_twice(build, drawn, evaluated):
    world, size, rollout, update_seconds = drawn
    validation = make_prompts(3, first=DATASET_SIZE)
    rollouts = build(world, num_prompts=size, rollout=rollout, validation=validation)
    used = []
    for step, groups in enumerate(
        steps(world, rollouts, 1, 6, update_seconds=update_seconds, evaluated=evaluated), start=1
    ):
        flat = sum(has_zero_std(group) for group in groups)
        if rollout["dynamic_sample"]:
            assert flat == rollouts.metrics()["dynamic_sample/groups_without_variance"]
        if rollout["max_staleness"] == 0:  # nothing outlives its step
            assert world.engines.num_pending == world.rewards.num_pending == 0
        assert len(groups) == size
        assert sorted(group.group_id for group in groups) == list(range(size))
        assert numbers(groups) == sorted(numbers(groups))
        assert all(staleness_of(step, group) <= rollout["max_staleness"] for group in groups)
        used += numbers(groups)
        metrics = rollouts.metrics()
        assert metrics["staleness/max"] == max(staleness_of(step, group) for group in groups)
        assert metrics["idle/rollout_seconds"] >= 0.0
        assert 0.0 <= metrics["idle/rollout_frac"] <= 1.0 + 1e-9
        assert 0.0 <= metrics["idle/policy_frac"] <= 1.0 + 1e-9
    splits = {"train": [], "filtered": [], "eval": []}
    for _, _, group, _, split in world.tracker.completions:
        splits[split].append(number_of(group.prompt))
    assert sorted(splits["train"]) == sorted(used)
    state = rollouts.state_dict()
    unused = [draw["place"] for draw in state["unused"]]
    everything = used + splits["filtered"] + unused
    assert sorted(everything) == list(range(state["prompts"]["num_taken"]))


@given(worlds(), st.integers(1, 4))
def test_a_resumed_run_trains_on_what_is_left_and_on_nothing_twice(build, drawn, last):
    world, size, rollout, _ = drawn
    first_life = build(world, num_prompts=size, **rollout)
    used = [n for groups in steps(world, first_life, 1, last) for n in numbers(groups)]
    state = json.loads(json.dumps(first_life.state_dict()))
    filtered = [
        number_of(group.prompt)
        for _, _, group, _, split in world.tracker.completions
        if split == "filtered"
    ]
    again = World(world.seconds["sampling"], world.seconds["scoring"], world.flat)
    second_life = build(again, num_prompts=size, **rollout)
    second_life.load_state_dict(state)
    for groups in steps(again, second_life, last + 1, last + 5):
        used += numbers(groups)
    filtered += [
        number_of(group.prompt)
        for _, _, group, _, split in again.tracker.completions
        if split == "filtered"
    ]
    assert max(Counter(used + filtered).values()) == 1
    state = second_life.state_dict()
    unused = [draw["place"] for draw in state["unused"]]
    assert sorted(used + filtered + unused) == list(range(state["prompts"]["num_taken"]))


@given(worlds(), st.integers(1, 4))
def test_a_step_can_be_continued_from_until_the_next_one_is_whole(build, drawn, last):
    """Wherever the next step is interrupted, the state after the last one is what it was."""
    world, size, rollout, _ = drawn
    rollouts = build(world, num_prompts=size, **rollout)
    for _ in steps(world, rollouts, 1, last):
        pass
    after = json.dumps(rollouts.state_after(last))
    assert after == json.dumps(rollouts.state_dict())
    for _ in steps(world, rollouts, last + 1, last + 1):
        assert json.dumps(rollouts.state_after(last)) == after
    assert json.dumps(rollouts.state_after(last + 1)) == json.dumps(rollouts.state_dict())


@given(worlds())
def test_filtering_without_oversampling_depends_on_no_clock(build, drawn):
    world, size, rollout, _ = drawn
    rollout |= {"max_staleness": 0, "oversample_prompts": None}
    fast = World(lambda number: 0.0, flat=world.flat)
    batches = [
        [numbers(groups) for groups in steps(w, build(w, num_prompts=size, **rollout), 1, 4)]
        for w in (world, fast)
    ]
    assert batches[0] == batches[1]
    seeds = [
        sorted((r.prompt.prompt_id, r.seed) for r in w.engines.requests) for w in (world, fast)
    ]
    assert seeds[0] == seeds[1]


# --- running ahead -------------------------------------------------------------------------------


class Policy:
    """Updates take some seconds of the world's clock, weight syncs none."""

    policy_version = 0

    def __init__(self, world, update_seconds):
        self.world = world
        self.update_seconds = update_seconds
        self.began_at = []

    def update(self, batch):
        self.began_at.append(self.world.now)
        self.world.pass_seconds(self.update_seconds)
        self.policy_version += 1
        return UpdateOutput(self.policy_version, {"loss": 0.0})

    def peak_memory_gib(self):
        return 1.0

    def publish(self):
        self.world.publish(self.policy_version)
        return {}

    def after_step(self, step):
        pass


def run(build, folder, *, rollout_seconds, update_seconds, max_steps=12, **rollout):
    """A run of the real loop; returns the world, the seconds of every step, and its metrics."""
    world = World(sampling=lambda number: rollout_seconds / 2, one_at_a_time=True)
    rollouts = build(world, num_prompts=2, **rollout)
    policy = Policy(world, update_seconds)
    config = rollouts._config.model_copy(update={"max_steps": max_steps})
    system = SimpleNamespace(
        config=config,
        rollouts=rollouts,
        policy=policy,
        reference=None,
        teacher=None,
        publisher=policy,
        restarts=Restarts(config.recovery),
        timeline=Timeline(),
    )
    train(system, world.tracker, policy, Health(rules_of(config, dtype="float32")))
    began = policy.began_at
    seconds = [end - start for start, end in pairwise(began)]
    return seconds[3:], [metrics for _, metrics in world.tracker.metrics[4:]]


@pytest.mark.parametrize(
    ("rollout_seconds", "update_seconds"), [(10.0, 4.0), (4.0, 10.0), (7.0, 7.0)]
)
def test_a_step_takes_the_longer_of_rollout_and_update_instead_of_both(
    build, tmp_path, rollout_seconds, update_seconds
):
    times = {"rollout_seconds": rollout_seconds, "update_seconds": update_seconds}
    in_turns, metrics = run(build, tmp_path, **times)
    assert in_turns == pytest.approx([rollout_seconds + update_seconds] * 8)
    for row in metrics:
        assert row["idle/rollout_seconds"] == pytest.approx(update_seconds)
        assert row["idle/policy_seconds"] == pytest.approx(rollout_seconds)
        assert row["staleness/max"] == 0.0
    overlapped, metrics = run(build, tmp_path, **times, max_staleness=1)
    longer, shorter = max(times.values()), min(times.values())
    assert overlapped == pytest.approx([longer] * 8)
    for row in metrics:
        waits = "policy" if rollout_seconds > update_seconds else "rollout"
        other = {"policy": "rollout", "rollout": "policy"}[waits]
        assert row[f"idle/{waits}_seconds"] == pytest.approx(longer - shorter)
        assert row[f"idle/{other}_seconds"] == pytest.approx(0.0)
        assert row[f"idle/{waits}_frac"] == pytest.approx((longer - shorter) / longer)
        assert row["staleness/max"] == 1.0


def test_rewards_are_computed_during_an_update(build):
    world = World(sampling=lambda number: 3.0, scoring=lambda number: 4.0)
    rollouts = build(world, num_prompts=2, max_staleness=1)
    list(steps(world, rollouts, 1, 3, update_seconds=10.0))
    start = world.now
    world.publish(3)
    rollouts.next_batch(4)
    assert world.now == start


def test_a_long_completion_stalls_no_step_before_it_is_due(build):
    world = World(sampling=lambda number: 16.0 if number == 1 else 1.0)
    rollouts = build(world, num_prompts=2, max_staleness=3)
    began, batches = [], []
    for groups in steps(world, rollouts, 1, 5):
        began.append(world.now)
        batches.append(numbers(groups))
    assert [end - start for start, end in pairwise(began)][:2] == [1.0, 1.0]
    (step,) = [step for step, batch in enumerate(batches, start=1) if 1 in batch]
    assert step == 4  # begun with version 0, and three versions late is still in time
    assert all(len(batch) == 2 for batch in batches)


def test_an_evaluation_shares_the_engines_and_is_of_one_version(build):
    world = World(sampling=lambda number: 5.0)
    rollouts = build(
        world,
        num_prompts=2,
        validation=make_prompts(3, first=500),
        rollout={"max_staleness": 1},
    )
    (first,) = steps(world, rollouts, 1, 1)
    world.publish(1)
    metrics = rollouts.evaluate(1)
    assert metrics["eval/completions/mean_length"] > 0
    evaluated = [
        number_of(group.prompt)
        for _, _, group, _, split in world.tracker.completions
        if split == "eval"
    ]
    assert sorted(evaluated) == [500, 501, 502]
    second = rollouts.next_batch(2)
    assert numbers(first + second) == [0, 1, 2, 3]


def test_groups_without_variance_that_end_during_an_evaluation_are_replaced(build):
    world = World(sampling=lambda n: 5.0 if n < 500 else 6.0, flat=lambda n: n % 2 == 1)
    rollouts = build(
        world,
        num_prompts=2,
        validation=make_prompts(2, first=500),
        rollout={"max_staleness": 1, "dynamic_sample": True, "max_resample_times": 5},
    )
    for groups in steps(world, rollouts, 1, 4, evaluated=(2, 3)):
        assert not any(has_zero_std(group) for group in groups)


def test_nothing_is_begun_that_the_last_step_does_not_need(build):
    world = World(sampling=lambda number: 1.0)
    rollouts = build(world, num_prompts=4, rollout={"max_staleness": 4}, max_steps=3)
    assert [len(groups) for groups in steps(world, rollouts, 1, 3)] == [4, 4, 4]
    assert len(world.engines.requests) == 3 * 4


def test_a_failure_that_nobody_came_back_for_is_handed_out_at_the_end_once(build):
    world = World(sampling=lambda number: 5.0 if number < 2 else 10.0)
    rollouts = build(world, num_prompts=2, max_staleness=1)
    rollouts.next_batch(1)

    def broken():
        raise RuntimeError("rollout engine 0: device-side assert")

    world.engines.collect = broken
    world.pass_seconds(10.0)
    assert str(rollouts.close()) == "rollout engine 0: device-side assert"
    assert rollouts.close() is None


def test_a_failure_while_the_driver_is_busy_is_raised_when_it_comes_back(build):
    world = World(sampling=lambda number: 5.0 if number < 2 else 10.0)
    rollouts = build(world, num_prompts=2, max_staleness=1)
    rollouts.next_batch(1)

    def broken():
        raise PhaseTimeout("reward worker 0 was killed")

    world.engines.collect = broken
    world.pass_seconds(10.0)
    with pytest.raises(PhaseTimeout, match="reward worker 0 was killed"):
        rollouts.next_batch(2)


def test_a_completion_that_is_too_stale_is_never_trained_on(build):
    """Engines that do not hold the version that was published: a bug, and not a silent one."""
    world = World(sampling=lambda number: 1.0)
    rollouts = build(world, num_prompts=2)
    with pytest.raises(
        RuntimeError, match=r"weight version 0: 2 versions stale.*max_staleness = 0"
    ):
        rollouts.next_batch(3)


# --- oversampling --------------------------------------------------------------------------------


def test_stragglers_are_given_up_and_come_first_in_the_next_step(build):
    world = World(sampling=lambda number: NEVER if number == 1 and world.version == 0 else 1.0)
    rollouts = build(world, num_prompts=2, oversample_prompts=1)
    first, second = steps(world, rollouts, 1, 2)
    assert (numbers(first), numbers(second)) == ([0, 2], [1, 3])
    assert [group.group_id for group in first] == [0, 1]
    straggler = [r for r in world.engines.requests if number_of(r.prompt) == 1]
    assert len(straggler) == 2
    assert straggler[0].seed != straggler[1].seed
    assert straggler[0].ticket in world.engines.aborted
    assert rollouts.metrics()["rollout/groups_cut_off"] == 1.0


def test_stragglers_are_given_up_wherever_they_are(build):
    world = World(
        sampling=lambda number: NEVER if number == 1 else 1.0,
        scoring=lambda number: NEVER if number == 2 else 1.0,
    )
    rollouts = build(world, num_prompts=2, oversample_prompts=2)
    assert numbers(rollouts.next_batch(1)) == [0, 3]
    assert world.engines.num_pending == 0
    assert world.rewards.num_pending == 0
    assert rollouts.metrics()["rollout/groups_cut_off"] == 2.0


def test_engines_whose_stragglers_were_given_up_count_as_idle(build):
    world = World(sampling=lambda number: 4.0 if number % 4 == 3 else 1.0)
    rollouts = build(world, num_prompts=3, oversample_prompts=1)
    rollouts.next_batch(1)
    world.pass_seconds(10.0)
    world.publish(1)
    metrics = rollouts.metrics()
    assert metrics["rollout/groups_cut_off"] == 1.0
    assert metrics["idle/policy_seconds"] == 1.0
    assert metrics["idle/rollout_seconds"] == 10.0


def test_stragglers_go_on_where_staleness_allows_it(build):
    world = World(sampling=lambda number: 3.5 if number == 1 else 1.0)
    rollouts = build(world, num_prompts=2, max_staleness=2, oversample_prompts=1)
    batches = [numbers(groups) for groups in steps(world, rollouts, 1, 3)]
    assert batches[0] == [0, 2]
    assert sorted(chain(*batches)) == [0, 1, 2, 3, 4, 5]
    assert world.engines.aborted == []
    assert [number_of(r.prompt) for r in world.engines.requests].count(1) == 1
    assert rollouts.metrics()["rollout/groups_ahead"] == 1.0


# --- dynamic sampling ----------------------------------------------------------------------------


def test_groups_without_variance_are_replaced_and_on_record(build):
    world = World(sampling=lambda number: 1.0, flat=lambda number: number in (0, 2))
    rollouts = build(world, num_prompts=2, dynamic_sample=True)
    assert numbers(rollouts.next_batch(1)) == [1, 3]
    splits = Counter(split for *_, split in world.tracker.completions)
    assert splits == {"train": 2, "filtered": 2}
    metrics = rollouts.metrics()
    assert metrics["dynamic_sample/groups_filtered"] == 2.0
    assert metrics["dynamic_sample/groups_resampled"] == 2.0
    assert metrics["dynamic_sample/resample_times"] == 1.0
    assert metrics["dynamic_sample/groups_without_variance"] == 0.0


def test_resampling_ends_and_says_so(build):
    world = World(sampling=lambda number: 1.0, flat=lambda number: number != 4)
    rollouts = build(world, num_prompts=2, dynamic_sample=True, max_resample_times=2)
    assert numbers(rollouts.next_batch(1)) == [0, 4]
    assert len(world.engines.requests) == 2 + 2 * 2
    metrics = rollouts.metrics()
    assert metrics["dynamic_sample/groups_without_variance"] == 1.0
    assert metrics["dynamic_sample/groups_filtered"] == 4.0
    assert metrics["dynamic_sample/resample_times"] == 2.0


def test_a_step_whose_resamples_are_used_up_waits_for_nothing_that_is_due_later(build):
    world = World(
        sampling=lambda number: 100.0 if number == 11 else 1.0, flat=lambda n: n not in (0, 11)
    )
    rollouts = build(
        world,
        num_prompts=2,
        max_staleness=4,
        dynamic_sample=True,
        max_resample_times=1,
        timeout_s=500.0,
    )
    start = world.now
    assert numbers(rollouts.next_batch(1)) == [0, 1]
    assert world.now - start < 3.0
    assert rollouts.metrics()["dynamic_sample/groups_without_variance"] == 1.0
    assert 11 in chain(*(numbers(groups) for groups in steps(world, rollouts, 2, 6)))


def test_a_checkpoint_of_other_data_says_so(build):
    world = World(sampling=lambda number: 1.0)
    rollouts = build(world, num_prompts=2, max_staleness=1)
    rollouts.next_batch(1)
    state = rollouts.state_dict()
    state["unused"][0]["prompt"] = "gone:7"
    with pytest.raises(ValueError, match=r"'gone:7'.*not what the run started with"):
        build(World(lambda number: 1.0), num_prompts=2, max_staleness=1).load_state_dict(state)


def test_every_scored_group_is_observed_once_in_the_order_of_the_stream(build, monkeypatch):
    world = World(sampling=lambda number: 5.0 - number % 5, flat=lambda number: number == 0)
    rollouts = build(world, num_prompts=2, dynamic_sample=True)
    observed = []
    monkeypatch.setattr(
        rollouts._prompts, "observe", lambda group: observed.append(number_of(group.prompt))
    )
    list(steps(world, rollouts, 1, 2))
    assert observed == [0, 1, 2, 3, 4]


def test_what_became_of_drafts_is_a_metric_of_the_step(build):
    world = World(lambda number: 1.0)
    counts = [DraftCounts(2, 8, 4), DraftCounts(2, 8, 4), DraftCounts(4, 18, 5)]
    world.engines.draft_counts = lambda: counts.pop(0)
    drafts = {"method": "ngram", "num_speculative_tokens": 5}
    rollouts = build(world, num_prompts=2, speculative_config=drafts)
    found = []
    for step in (1, 2, 3):
        world.version = step - 1
        rollouts.next_batch(step)
        found.append(rollouts.metrics().get("rollout/spec_acceptance_rate"))
    assert found == [0.5, None, 0.1]  # nothing was drafted in the second step
