"""Engines that die or hang are replaced, and what is sampled stays the same to the bit."""

import os
import signal
import time

import pytest
import ray
from engine_faults import MOMENTS, SIGNALS, plan_fault, process_of, workers_of
from greedy_rollouts import PROMPTS
from patience import PATIENCE_S
from tensor_policy import TensorPolicy

from rlsys.actors.recovery import Restarts
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorDeath
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config.schema import RecoveryConfig
from rlsys.problems import RunFailed
from rlsys.types import SampleRequest

pytestmark = pytest.mark.system

HEARTBEAT_S = 5.0


class World:
    """Engines with a policy whose weights they sample with."""

    def __init__(self, config, folders):
        self.engines = RolloutActors(config, device="cpu")
        self.folders = folders
        self.policy = TensorPolicy(folders[0])
        self.engines.start()
        self.publisher = WeightPublisher(self.policy, self.engines, config.weight_sync)
        self.engines.publisher = self.publisher
        self.lines = []
        self.allow_restarts()

    def allow_restarts(self, **config):
        """Restarts that remember nothing."""
        self.lines.clear()
        self.restarts = Restarts(RecoveryConfig(**config), say=self.lines.append)
        self.restarts.watch(self.engines, HEARTBEAT_S)

    def publish(self, number):
        """Publish the weights of one of the folders as the next version."""
        self.policy.set_weights(self.folders[number])
        self.publisher.publish()

    def submit(self, seed=0):
        self.engines.submit(
            [SampleRequest(i, prompt, 4, 1.0, seed + 100 * i) for i, prompt in enumerate(PROMPTS)]
        )

    def collect(self):
        """All groups that are pending, by ticket; each comes once."""
        groups = {}
        while self.engines.num_pending:
            self.engines.bring_back()
            ray.wait(self.engines.pending_refs(), timeout=0.5)
            for group in self.engines.collect():
                assert group.ticket not in groups
                groups[group.ticket] = group
        return groups

    def sample(self, seed=0):
        """Tokens, log-probs and finish reasons of all completions, to the bit, and versions."""
        self.submit(seed)
        groups = self.collect()
        assert set(groups) == set(range(len(PROMPTS)))
        versions = {one.policy_versions for group in groups.values() for one in group.completions}
        return bits_of(groups), versions

    def wait_for_successors(self):
        """Publish until everyone is back."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.engines.actors) < self.engines.num_engines:
            self.publisher.publish()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def close(self):
        self.restarts.close()
        self.engines.close()
        self.policy.close()


def bits_of(groups):
    """Tokens, log-probs and finish reasons of all completions, to the bit."""
    completions = [one for ticket in sorted(groups) for one in groups[ticket].completions]
    return [(one.token_ids, one.rollout_logprobs, one.finish_reason) for one in completions]


@pytest.fixture(scope="module")
def start(ray_cluster, rollout_config, tiny_models):
    worlds = {}

    def start(num_engines, **rollout):
        key = (num_engines, *rollout.values())
        if key not in worlds:
            config = rollout_config(num_engines=num_engines, max_completion_length=64, **rollout)
            worlds[key] = World(config, [tiny_models[True, 1], tiny_models[True, 2]])
        world = worlds[key]
        world.restarts.close()
        world.allow_restarts()
        return world

    yield start
    for world in worlds.values():
        world.close()


@pytest.fixture(scope="module")
def undisturbed(start):
    """What two engines sample that nothing disturbs, by the number of the weights."""
    world, samples = start(2), {}
    for number in (0, 1):
        world.publish(number)
        samples[number], _ = world.sample()
    return samples


def test_what_is_sampled_does_not_depend_on_who_shares_a_batch(start, undisturbed):
    world = start(2)
    world.publish(0)
    tickets = {i: (prompt, 100 * i) for i, prompt in enumerate(PROMPTS)}
    groups = {}
    for ticket, (prompt, seed) in tickets.items():  # one after the other
        world.engines.submit([SampleRequest(ticket, prompt, 4, 1.0, seed)])
        groups |= world.collect()
    assert bits_of(groups) == undisturbed[0]


def test_an_engine_that_dies_while_it_samples_is_replaced(start, undisturbed):
    world = start(2)
    world.publish(1)
    plan_fault(world.engines.actors["rollout engine 0"], "sampling", "kill")
    samples, versions = world.sample()
    assert samples == undisturbed[1]
    assert versions == {(world.policy.policy_version,)}
    assert "rollout engine 0 failed in rollout of step" in world.lines[0]
    world.wait_for_successors()
    assert world.lines[-1].startswith("note: rollout engine 0 works again")
    assert world.restarts.metrics()["fault/rollout_restarts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("num_engines", [2, 1])
def test_a_fault_at_any_moment_changes_nothing(start, undisturbed, num_engines, moment, how):
    world = start(num_engines)
    world.publish(0)
    plan_fault(world.engines.actors["rollout engine 0"], moment, how)
    world.publish(1)
    samples, versions = world.sample()
    assert samples == undisturbed[1]
    assert versions == {(world.policy.policy_version,)}
    assert world.restarts.metrics()["fault/rollout_restarts"] == 1
    world.wait_for_successors()
    world.publish(0)
    assert world.sample() == (undisturbed[0], {(world.policy.policy_version,)})


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pausing", "transfer"])
def test_completions_in_flight_survive_a_failed_weight_sync(start, moment):
    world = start(2)
    world.publish(0)
    before = world.policy.policy_version
    world.submit()
    plan_fault(world.engines.actors["rollout engine 1"], moment, "kill")
    world.publish(1)
    groups = world.collect()
    assert set(groups) == set(range(len(PROMPTS)))
    allowed = {(before,), (before + 1,), (before, before + 1)}
    completions = [one for group in groups.values() for one in group.completions]
    assert {one.policy_versions for one in completions} <= allowed
    world.wait_for_successors()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pausing", "transfer"])
def test_an_engine_that_hangs_in_a_weight_sync_is_replaced(start, undisturbed, moment):
    """Its process gives signs of life, so only the deadline of the sync tells."""
    world = start(2)
    world.publish(0)
    config = world.publisher._config
    world.publisher._config = config.model_copy(update={"timeout_s": 15.0})
    world.publisher.connect()
    hanging = world.engines.actors["rollout engine 1"]
    plan_fault(hanging, moment, "hang")
    world.publish(1)
    world.publisher._config = config
    assert hanging not in world.engines.actors.values()
    assert world.restarts.metrics()["fault/rollout_restarts"] == 1
    assert "it took no part" in world.lines[0]
    samples, versions = world.sample()
    assert samples == undisturbed[1]
    assert versions == {(world.policy.policy_version,)}
    world.wait_for_successors()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_an_engine_whose_worker_fails_is_replaced(start, how):
    world = start(1, tensor_parallel_size=2)
    world.publish(0)
    expected, _ = world.sample()
    world.publish(0)
    (_, worker) = workers_of(world.engines.actors["rollout engine 0"])
    world.submit()
    os.kill(worker, SIGNALS[how])
    groups = world.collect()
    assert bits_of(groups) == expected
    assert world.restarts.metrics()["fault/rollout_restarts"] == 1


@pytest.mark.slow
def test_the_same_failure_again_ends_the_run(start):
    world = start(1)
    world.publish(0)
    pid = process_of(world.engines.actors["rollout engine 0"])
    world.submit()
    os.kill(pid, signal.SIGKILL)
    while not world.restarts.metrics():
        world.engines.collect()
    while len(world.engines.actors) == 0:
        world.engines.bring_back()
        time.sleep(0.1)
    os.kill(process_of(world.engines.actors["rollout engine 0"]), signal.SIGKILL)
    world.submit(seed=7)
    with pytest.raises(RunFailed, match="for the second time in this place"):
        world.collect()


@pytest.mark.slow
def test_without_restarts_the_first_failure_ends_the_run(start):
    world = start(2)
    world.restarts.close()
    world.allow_restarts(max_restarts=0)
    os.kill(process_of(world.engines.actors["rollout engine 0"]), signal.SIGKILL)
    world.submit()
    with pytest.raises(ActorDeath, match="rollout engine 0 died in rollout"):
        world.collect()
    assert world.lines == []
