"""policy.on_nonfinite: rollback. The policy goes back to a good state, once from each."""

import os
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from policy_cases import LAYOUTS, LabRank, exported, policy_config, random_batch
from safetensors.torch import load_file
from test_policy_nonfinite import assert_same, poisoned, states

from rlsys.actors.policy import PolicyActors
from rlsys.actors.recovery import Restarts
from rlsys.actors.reference import ReferenceActors
from rlsys.actors.waiting import ActorFailure
from rlsys.config.schema import RecoveryConfig
from rlsys.engines.step_dump import read_step
from rlsys.problems import RunFailed

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def start(lab, policy_models, tmp_path):
    """A policy at version 2, and a checkpoint of version 1."""

    def start(layout="one rank", *, grpo=None, **options):
        config = policy_config(
            policy_models["qwen3-tied"],
            grpo=grpo,
            nonfinite_dumps=3,
            max_nonfinite_steps=2,
            **{"on_nonfinite": "rollback", **options},
            **LAYOUTS[layout],
        )
        policy = lab.policy(config.model_copy(update={"output_dir": str(tmp_path / "run")}))
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        policy.update(random_batch(1))
        policy.save_checkpoint(folder)
        policy.update(random_batch(2))
        policy.checkpoints = lambda: [(1, folder)]
        return policy

    yield start
    lab.policy(policy_config(policy_models["qwen3-tied"])).checkpoints = lambda: []


@pytest.mark.parametrize("layout", ["one rank", "TP 2", "PP 2 x DP 2"])
def test_damaged_weights_come_back_from_the_checkpoint(start, layout, capsys):
    policy = start(layout)
    last = policy.config.policy.world_size - 1
    policy.call("damage", "weight", "linear_fc2.weight", last)
    assert policy.update(random_batch(3)).metrics["fault/nonfinite_steps"] == 1
    output = policy.update(random_batch(4))
    assert output.policy_version == policy.policy_version == 4
    assert policy.finished_version() == 4
    assert output.metrics["grad_norm"] > 0
    printed = capsys.readouterr().out
    assert "warning: the policy went back to the checkpoint " in printed
    assert "goes on as version 3, because the update of policy version 3 has a gradient" in printed
    after = states(policy)
    ((_, folder),) = policy.checkpoints()
    policy.load_checkpoint(folder)
    policy.update(random_batch(4))
    assert_same(states(policy), after)


def test_a_snapshot_of_damaged_weights_does_not_replace_the_one_before(start, capsys):
    policy = start()
    restarts = Restarts(RecoveryConfig())
    try:
        restarts.watch(policy, None)
        policy.update(random_batch(3))
        before = states(policy)
        policy.call("damage", "weight", "linear_fc2.weight", 0)
        assert policy.update(random_batch(4)).metrics["fault/nonfinite_steps"] == 1
        policy.update(random_batch(5))
        assert "went back to the snapshot of version 3, and" in capsys.readouterr().out
        after = states(policy)
        newest = policy.snapshots.newest
        assert newest.version == 3
        policy.restore(newest)
        assert_same(states(policy), before)
        policy.update(random_batch(5))
        assert_same(states(policy), after)
    finally:
        restarts.close()
        policy.restarts = None
        policy.snapshots.settle(timeout_s=PATIENCE_S)
        policy.snapshots.newest = None


def test_a_batch_that_fails_again_ends_the_run_with_the_dumps_path(start):
    policy = start()
    bad = poisoned(random_batch(3), "advantages")
    policy.update(bad)
    message = (
        r"(?s)Not finite: loss, gradient, 1 value of advantages.*rlsys replay .*/dumps/step-4.*"
    )
    message += r"on_nonfinite is rollback, and the same again from the checkpoint .*/checkpoint"
    with pytest.raises(RunFailed, match=message):
        policy.update(bad)


def test_without_a_state_to_go_back_to_the_run_ends(start):
    policy = start()
    policy.checkpoints = lambda: []
    policy.update(poisoned(random_batch(3), "advantages"))
    with pytest.raises(RunFailed, match=r"neither a snapshot \(policy.snapshot_steps\) nor a"):
        policy.update(poisoned(random_batch(3), "advantages"))


def test_weights_that_are_not_finite_are_an_error_of_the_sync(start):
    policy = start(grpo={"beta": 0.1}, on_nonfinite="skip")
    section = policy.config.reference.model_copy(update={"sync_steps": 1})
    config = policy.config.model_copy(update={"reference": section})
    reference = ReferenceActors(config, device="cpu")
    try:
        reference.start()
        reference.connect_to(policy)
        reference.sync()
        policy.call("damage", "weight", "embedding.word_embeddings.weight", 0)
        message = "the weights of policy version 2 hold NaNs or infinities.*embed_tokens"
        with pytest.raises(ActorFailure, match=message):
            reference.sync()
    finally:
        reference.close()


@pytest.mark.parametrize(
    ("layout", "rank", "name"),
    [
        ("one rank", 0, "embedding.word_embeddings.weight"),
        ("TP 2", 1, "linear_fc2.weight"),
        ("PP 2 x DP 2", 2, "linear_fc2.weight"),
    ],
)
def test_a_sync_goes_back_to_finite_weights_and_sends_those(
    start, tmp_path, capsys, layout, rank, name
):
    """The reference has mixed NaNs in by then: it starts again from what it was."""
    policy = start(layout, grpo={"beta": 0.1})
    section = {"sync_steps": 1, "mixup_alpha": 0.25}
    section = policy.config.reference.model_copy(update=section)
    config = policy.config.model_copy(update={"reference": section})
    before = load_file(Path(config.model.path) / "model.safetensors")
    reference = ReferenceActors(config, device="cpu")
    try:
        reference.start()
        reference.connect_to(policy)
        policy.call("damage", "weight", name, rank)
        reference.sync()
        reference.save_model(tmp_path / "mixed")
    finally:
        reference.close()
    printed = capsys.readouterr().out
    assert "warning: the policy went back to the checkpoint " in printed
    assert "as version 2, because the weights of policy version 2" in printed
    sent, mixed = exported(policy), load_file(tmp_path / "mixed/model.safetensors")
    ((_, folder),) = policy.checkpoints()
    policy.load_checkpoint(folder)
    torch.testing.assert_close(sent, exported(policy), atol=0, rtol=0)
    mix = {key: 0.75 * before[key] + 0.25 * sent[key] for key in before}
    torch.testing.assert_close(mixed, mix, atol=1e-6, rtol=1e-6)


class FatalRank(LabRank):
    """A rank for which the second batch is deadly."""

    def update(self, batch, loss):
        if self.engine.policy_version == 1:
            os._exit(1)
        return super().update(batch, loss)


def test_a_batch_with_which_a_rank_dies_twice_is_dumped(ray_cluster, policy_models, tmp_path):
    config = policy_config(policy_models["qwen3-tied"])
    config = config.model_copy(update={"output_dir": str(tmp_path / "run")})
    policy = PolicyActors(config, device="cpu", rank_class=FatalRank)
    restarts = Restarts(RecoveryConfig(backoff_s=0.0))
    try:
        policy.start(PATIENCE_S)
        restarts.watch(policy, None)
        policy.update(random_batch(1))
        with pytest.raises(
            RunFailed, match=r"(?s)second time in this place.*rlsys replay .*step-2"
        ):
            policy.update(random_batch(2))
    finally:
        restarts.close()
        policy.close()
    dump = read_step(tmp_path / "run/dumps/step-2")
    assert torch.equal(dump.step.batch.input_ids, random_batch(2).input_ids)
    assert "second time in this place" in dump.fault.reason
    assert (dump.weights, dump.weights_version, dump.step.policy_version) == (None, 0, 1)
