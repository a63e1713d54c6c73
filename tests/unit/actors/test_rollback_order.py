"""Which states a policy goes back to, in which order; tests/actors/test_rollback.py has ranks."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from algo_cases import make_batch
from config_cases import write_run

from rlsys.actors.rollback import dump_update, update_from_good_state, with_finite_weights
from rlsys.actors.waiting import ActorFailure
from rlsys.commands.replay import about
from rlsys.config.load import load_config
from rlsys.engines.step_dump import read_step
from rlsys.problems import NonFiniteWeights, RunFailed
from rlsys.types import UpdateOutput

BAD = ActorFailure("...", cause=NonFiniteWeights("the weights of ..."))


@dataclass
class States:
    """What rollback asks of `PolicyActors`."""

    on_nonfinite: str = "rollback"
    snapshot: int | None = 6
    folders: tuple = ((4, "step-4"), (2, "step-2"))
    damaged: tuple = ()
    policy_version: int = 7
    weights: object = "bad"
    calls: list = field(default_factory=list)

    def __post_init__(self):
        newest = None if self.snapshot is None else SimpleNamespace(version=self.snapshot)
        self.snapshots = SimpleNamespace(settle=lambda timeout_s: None, newest=newest)
        self.config = SimpleNamespace(policy=SimpleNamespace(on_nonfinite=self.on_nonfinite))
        self.timeout_s = 1.0

    def checkpoints(self):
        return self.folders

    def restore(self, snapshot):
        self.weights = snapshot.version

    def continue_from(self, restore):
        restore()

    def call(self, method, folder):
        assert method == "load_checkpoint"
        self.weights = folder

    def call_in_turn(self, method):
        assert method == "has_finite_weights"
        return [self.weights not in self.damaged, True]


def update_of(policy, *, works_from):
    """An update that is finite from some weights only."""

    def update():
        policy.calls.append((policy.weights, policy.policy_version))
        works = policy.weights in works_from
        return UpdateOutput(8 if works else 7, {}, None if works else "again: rlsys replay D")

    return update


@pytest.mark.parametrize(
    ("options", "works_from", "tried"),
    [
        ({}, [6, "step-4"], [6]),
        ({}, ["step-4"], [6, "step-4"]),
        ({"damaged": (6,)}, [6, "step-4"], ["step-4"]),
        ({"snapshot": None}, ["step-4"], ["step-4"]),
    ],
)
def test_the_newest_state_with_finite_weights_comes_first(options, works_from, tried, capsys):
    policy = States(**options)
    output = update_from_good_state(policy, update_of(policy, works_from=works_from), "why")
    assert output.policy_version == 8
    # The version stays: the step is the run's, whatever state it starts from.
    assert policy.calls == [(weights, 7) for weights in tried]
    assert capsys.readouterr().out.count("warning: the policy went back to the ") == len(tried)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "the same again from the snapshot of version 6 and the checkpoint step-4"),
        ({"snapshot": None, "folders": ()}, "there is neither a snapshot"),
        ({"damaged": (6, "step-4")}, "with finite weights to go back to"),
    ],
)
def test_it_ends_with_the_reason_where_no_state_helps(options, says):
    policy = States(**options)
    with pytest.raises(
        RunFailed, match=f"(?s)rlsys replay D.*on_nonfinite is rollback, and.*{says}"
    ):
        update_from_good_state(policy, update_of(policy, works_from=[]), "rlsys replay D")
    assert len(policy.calls) <= 2


def test_weights_are_sent_again_from_a_good_state():
    policy = States()

    def send():
        if policy.weights == "bad":
            raise BAD
        return {"seconds": 1.0}

    assert with_finite_weights(policy, send) == {"seconds": 1.0}
    assert (policy.weights, policy.policy_version) == (6, 7)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "rollback"])
def test_other_failures_and_other_settings_change_nothing(on_nonfinite):
    error = BAD if on_nonfinite != "rollback" else ActorFailure("x", reason="KeyError()")
    policy = States(on_nonfinite=on_nonfinite)

    def send():
        raise error

    with pytest.raises(ActorFailure) as raised:
        with_finite_weights(policy, send)
    assert raised.value is error
    assert policy.weights == "bad"


@pytest.mark.parametrize("folders", [(), ((2, "checkpoints/step-2"), (4, "checkpoints/step-4"))])
def test_the_batch_of_an_update_in_which_ranks_die_is_dumped(tmp_path, folders):
    policy = States(folders=tuple((step, str(tmp_path / name)) for step, name in folders))
    policy.config = load_config(write_run(tmp_path)).config
    batch = make_batch([[2, 3], [1, 4]])
    said = dump_update(policy, batch, None, "a traceback\npolicy rank 0 died in policy update")
    dump = read_step(Path(policy.config.output_dir) / "dumps/step-8")
    assert f"rlsys replay {dump.folder}" in said
    assert torch.equal(dump.step.batch.input_ids, batch.input_ids)
    assert (dump.step.rows, dump.step.policy_version) == ([0, 1, 2, 3], 7)
    assert dump.weights == (tmp_path / "checkpoints/step-4" if folders else None)
    lines = list(about(dump))
    assert "note: the run ended in this step: policy rank 0 died in policy update" in lines
    version = 4 if folders else 0
    assert any(f"the weights are those of version {version}, the newest" in line for line in lines)
    again = dump_update(policy, batch, None, "x")
    assert "dumps/step-8-2" in again
