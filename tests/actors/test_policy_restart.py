"""A policy whose ranks are killed or stopped goes on as if nothing had happened."""

import os
import signal
from functools import partial

import pytest
import ray
from lora_cases import with_lora
from patience import PATIENCE_S
from policy_cases import LAYOUTS, LabRank, exported, policy_config, random_batch
from resume_cases import SCHEDULE
from safetensors.torch import load_file
from test_policy_snapshot import assert_equal

from rlsys.actors.policy import PolicyActors
from rlsys.actors.recovery import Restarts
from rlsys.actors.reference import ReferenceActors, ReferenceRank
from rlsys.actors.waiting import ActorDeath
from rlsys.config.schema import RecoveryConfig
from rlsys.problems import RunFailed

pytestmark = pytest.mark.system

HEARTBEAT_S = 6.0
NO_WAIT = RecoveryConfig(max_restarts=100, backoff_s=0.0)


class Mortal:
    """A rank that gets a signal in the middle of a phase."""

    def arm(self, rank, where, number):
        """Have `rank` send itself the signal when it comes to a place."""
        if rank != self.rank:
            return
        engine = self.engine
        places = {
            "compute_logprobs": (engine.model[0], "forward"),
            "save_model": (engine.weights, "export"),
        }
        if hasattr(engine, "optimizer"):
            places["update"] = engine.optimizer, "step"  # gradients are reduced, weights not moved
            places["begin_checkpoint"] = engine.scheduler, "state_dict"
            places["rollback"] = engine.scheduler, "step"  # comes last in putting a state back
        owner, name = places[where]
        original = getattr(owner, name)

        def end(*args, **kwargs):
            os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        setattr(owner, name, end)


class MortalRank(Mortal, LabRank):
    pass


class MortalReference(Mortal, ReferenceRank):
    pass


@pytest.fixture
def mortal(ray_cluster):
    """Makes a policy that is restarted as a run's is, and the list of notes about that."""
    made = []

    def start(config, recovery=NO_WAIT):
        lines = []
        policy = PolicyActors(config, device="cpu", rank_class=MortalRank)
        restarts = Restarts(recovery, say=lines.append)
        made.append((policy, restarts, lines))
        policy.start(PATIENCE_S)
        restarts.watch(policy, HEARTBEAT_S)
        return policy, lines

    yield start
    for policy, restarts, lines in made:
        print(*lines, sep="\n")
        restarts.close()
        policy.close()


def config_of(folder, **policy):
    return policy_config(folder, max_steps=6, global_batch_size=4, **SCHEDULE, **policy)


def arm(group, rank, where, number=signal.SIGKILL):
    group.call("arm", rank, where, number)


def step(policy, version):
    """What a step of a run gets from its policy."""
    batch = random_batch(seed=version)
    batch.old_logprobs = policy.compute_logprobs(batch)[0]
    output = policy.update(batch)
    assert output.policy_version == policy.policy_version == version
    return output.metrics, batch.old_logprobs


def undisturbed(lab, config, versions):
    policy = lab.policy(config)
    return [step(policy, version) for version in versions], exported(policy)


def test_a_rank_that_is_killed_in_an_update_costs_time_only(lab, mortal, policy_models):
    config = config_of(policy_models["qwen3-tied"])
    expected = undisturbed(lab, config, [1, 2, 3])
    policy, lines = mortal(config)
    steps = [step(policy, 1)]
    arm(policy, 0, "update")
    steps += [step(policy, 2), step(policy, 3)]
    assert_equal((steps, exported(policy)), expected)
    failed, works = lines
    assert "policy rank 0 failed in update of step 2: its process ended" in failed
    assert "policy rank 0 works again" in works
    assert policy.snapshots.newest.version >= 2


KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@pytest.mark.slow
def test_ranks_fail_in_every_phase(lab, mortal, policy_models, tmp_path):
    config = config_of(policy_models["qwen3-tied"], **LAYOUTS["TP 2"])
    expected = undisturbed(lab, config, [1, 2, 3, 4, 5])
    policy, lines = mortal(config)
    steps = []
    for version, rank, phase, number in (
        (1, 1, "compute_logprobs", KILL),
        (2, 0, "update", STOP),
        (3, 1, "update", KILL),
        (4, 0, "compute_logprobs", STOP),
    ):
        arm(policy, rank, phase, number)
        steps.append(step(policy, version))
    for rank, phase, number, save in (
        (1, "begin_checkpoint", KILL, policy.save_checkpoint),
        (0, "begin_checkpoint", STOP, policy.save_checkpoint),
        (0, "save_model", KILL, policy.save_model),
        (1, "save_model", STOP, policy.save_model),
    ):
        folder = tmp_path / f"{phase}-{number.name}"
        if phase == "begin_checkpoint":
            folder.mkdir()
        arm(policy, rank, phase, number)
        save(folder)
    steps.append(step(policy, 5))
    assert_equal((steps, exported(policy)), expected)
    assert sum("works again" in line for line in lines) == 8
    assert sum("no sign of life" in line for line in lines if "failed" in line) == 4
    for name in ("begin_checkpoint-SIGKILL", "begin_checkpoint-SIGSTOP"):
        resumed = lab.policy(config)
        resumed.load_checkpoint(tmp_path / name)
        assert_equal((step(resumed, 5), exported(resumed)), (expected[0][4], expected[1]))
    assert_equal(
        *(load_file(tmp_path / f"save_model-{n.name}/model.safetensors") for n in (KILL, STOP))
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["DP 2", "PP 2", "EP 2", "adapter"])
def test_layouts_and_adapters_go_on(lab, mortal, policy_models, mixtures, case):
    layout = LAYOUTS.get(case, {})
    if case == "EP 2":
        layout = {"world_size": 2, "expert_model_parallel_size": 2}
    folder = mixtures[True] if case == "EP 2" else policy_models["qwen3-untied"]
    config = config_of(folder, **layout)
    expected = None
    if case == "adapter":
        config = with_lora(config, {"rank": 4, "dropout": 0.2, "modules_to_save": ["lm_head"]})
        # Dropout draws other masks where other policies were before.
        other, _ = mortal(config)
        expected = [step(other, version) for version in (1, 2, 3)], exported(other)
    expected = expected or undisturbed(lab, config, [1, 2, 3])
    policy, _ = mortal(config)
    steps = [step(policy, 1), step(policy, 2)]
    arm(policy, config.policy.world_size - 1, "update")
    steps.append(step(policy, 3))
    assert_equal((steps, exported(policy)), expected)


@pytest.mark.slow
def test_without_snapshots_updates_are_done_again_from_the_newest_checkpoint(
    lab, mortal, policy_models, tmp_path
):
    config = config_of(policy_models["qwen3-tied"], snapshot_steps=0)
    expected = undisturbed(lab, config, [1, 2, 3, 4])
    policy, _ = mortal(config)
    policy.checkpoints = lambda: [(2, tmp_path / "step-2")] if policy.policy_version >= 2 else []
    steps = [step(policy, 1)]
    arm(policy, 0, "update")  # from the start
    steps.append(step(policy, 2))
    (tmp_path / "step-2").mkdir()
    policy.save_checkpoint(tmp_path / "step-2")
    steps.append(step(policy, 3))
    arm(policy, 0, "update")
    policy._origin = None
    steps.append(step(policy, 4))
    assert_equal((steps, exported(policy)), expected)
    assert policy.snapshots.newest is None
    policy.checkpoints = list
    arm(policy, 0, "update")
    with pytest.raises(
        RunFailed, match=r"cannot go back to version 4 .* set policy.snapshot_steps"
    ):
        step(policy, 5)


@pytest.mark.slow
def test_ranks_that_die_after_a_rollback_come_back_to_the_state_that_it_went_to(
    mortal, policy_models, tmp_path
):
    """The state is older than the version that it got, and no newer one has been kept."""
    config = config_of(policy_models["qwen3-tied"], snapshot_steps=2)
    found = []
    for number in (None, KILL):
        policy, lines = mortal(config)
        for version in (1, 2, 3):
            step(policy, version)
        policy.snapshots.settle(timeout_s=PATIENCE_S)
        if number is not None:
            arm(policy, 0, "rollback", number)
        newest = policy.snapshots.newest
        assert newest.version == 2
        policy.continue_from(partial(policy.restore, newest))
        assert policy.policy_version == policy.finished_version() == 3
        steps = []
        for version in (4, 5):
            if number is not None:
                arm(policy, 0, "compute_logprobs" if version == 4 else "update", number)
            steps.append(step(policy, version))
        found.append((steps, exported(policy)))
    assert_equal(*found)
    assert sum("works again" in line for line in lines) == 3


@pytest.mark.slow
def test_a_snapshot_that_is_damaged_is_passed_over(lab, mortal, policy_models):
    config = config_of(policy_models["qwen3-tied"])
    expected = undisturbed(lab, config, [1, 2])
    policy, _ = mortal(config)
    steps = [step(policy, 1)]
    policy.snapshots.settle(timeout_s=PATIENCE_S)
    (name,) = policy.actors
    state = ray.get(policy.snapshots.newest.states[name])
    state.checksums[0] ^= 1
    policy.snapshots.newest.states[name] = ray.put(state)
    arm(policy, 0, "update")
    steps.append(step(policy, 2))
    assert_equal((steps, exported(policy)), expected)


@pytest.mark.slow
def test_a_rank_that_dies_ends_a_run_that_restarts_nothing(mortal, policy_models):
    config = config_of(policy_models["qwen3-tied"])
    policy, lines = mortal(config, RecoveryConfig(max_restarts=0))
    step(policy, 1)
    assert policy.snapshots.newest is None
    arm(policy, 0, "update")
    with pytest.raises(ActorDeath, match="policy rank 0 died in policy update"):
        step(policy, 2)
    assert lines == []


@pytest.mark.slow
def test_a_reference_goes_back_to_what_was_mixed_into_it(lab, mortal, policy_models):
    config = policy_config(policy_models["qwen3-tied"], grpo={"beta": 0.1})
    section = config.reference.model_copy(update={"sync_steps": 1, "mixup_alpha": 0.25})
    config = config.model_copy(update={"reference": section})

    def run(policy, number=None):
        reference = ReferenceActors(config, device="cpu", rank_class=MortalReference, policy=policy)
        reference.start(PATIENCE_S)
        reference.connect_to(policy)
        lines = []
        reference.restarts = Restarts(NO_WAIT, say=lines.append)
        found = []
        for version in (1, 2, 3):
            if number is not None and version > 1:
                arm(reference, 0, "compute_logprobs", number)
            found.append((reference.compute_logprobs(random_batch())[0], step(policy, version)))
            reference.sync()
        found.append(reference.compute_logprobs(random_batch())[0])
        reference.close()
        return found, lines

    expected, _ = run(lab.policy(config))
    found, lines = run(lab.policy(config), KILL)
    assert_equal(found, expected)
    assert sum("works again" in line for line in lines) == 2
