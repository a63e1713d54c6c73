"""A run that is interrupted or fails saves its last finished step, if the policy can."""

import json

import pytest
from config_cases import write_config

from rlsys.actors.waiting import ActorDeath, PhaseTimeout
from rlsys.config.load import load_config
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.saving import make_checkpoints, save_last_step
from rlsys.system import System


class Policy:
    """Writes its version; fails at a method on request."""

    timeout_s = 1000.0

    def __init__(self, version, **fails):
        self._version, self._fails = version, fails

    def _do(self, what):
        if what in self._fails:
            raise self._fails[what]

    def finished_version(self):
        self._do("finished_version")
        return self._version

    def save_model(self, folder):
        self._do("save_model")
        folder.mkdir(parents=True)
        (folder / "model").write_text(str(self._version))

    def begin_model(self, folder):
        raise AssertionError("no models are kept")

    def begin_checkpoint(self, folder):
        assert self.timeout_s <= 600
        (folder / "model").write_text(str(self._version))
        self._do("begin_checkpoint")
        return dict


class Rollouts:
    def state_after(self, step):
        return {"after": step}


class Reference:
    timeout_s = 1000.0
    synced_after = None

    def begin_state(self, folder):
        folder.mkdir()
        return dict


@pytest.fixture
def save(tmp_path, capsys):
    def save(policy, *overrides, reference=None, started_from=0, saved=()):
        config = load_config(write_config(tmp_path), list(overrides)).config
        run = RunDir(tmp_path / "run")
        for step in saved:
            (run.checkpoints / f"step-{step}").mkdir(parents=True)
        system = System(
            config, "cpu", policy, reference, None, Rollouts(), publisher=None, restarts=None
        )
        checkpoints = make_checkpoints(system, run)
        save_last_step(system, run, checkpoints, started_from=started_from)
        return run, capsys.readouterr().out

    return save


def test_the_last_finished_step_is_a_checkpoint(save):
    run, text = save(Policy(7), saved=[5])
    assert checkpoint_steps(run.checkpoints) == [5, 7]
    folder = run.checkpoints / "step-7"
    assert (folder / "model").read_text() == "7"
    assert json.loads((folder / "rollouts.json").read_text()) == {"after": 7}
    assert not run.interrupted.exists()
    assert "\nsaved step 7\n" in text
    assert str(folder) in text
    assert "--checkpoint.resume" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "transformers loads as a model"),
        (["--policy.lora.rank", "4"], "PEFT loads as an adapter"),
    ],
)
def test_what_can_load_the_checkpoint_is_said(save, words, says):
    run, text = save(Policy(7), *words)
    assert f"continues from {run.checkpoints / 'step-7'}, which {says}\n" in text


def test_without_checkpoints_the_weights_are_saved(save):
    run, text = save(Policy(7), "--checkpoint.save_steps", "null")
    assert (run.interrupted / "model").read_text() == "7"
    assert not run.checkpoints.exists()
    assert str(run.interrupted) in text
    assert "resume" not in text


@pytest.mark.parametrize("error", [PhaseTimeout("not within 3 s"), OSError("No space left")])
def test_weights_are_there_before_the_checkpoint_is_tried(save, error):
    run, text = save(Policy(7, begin_checkpoint=error), saved=[5])
    assert (run.interrupted / "model").read_text() == "7"
    assert checkpoint_steps(run.checkpoints) == [5]
    assert str(error) in text
    assert "step-5" in text


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(None), "in the middle of an update"),
        (Policy(7, finished_version=ActorDeath("policy rank 0 died")), "policy rank 0 died"),
        (Policy(3), "no step was finished since the start"),
        (Policy(5), "saved already"),
    ],
)
def test_where_nothing_can_be_saved_it_says_why_and_what_there_is(save, policy, reason):
    run, text = save(policy, started_from=3, saved=[3, 5])
    assert checkpoint_steps(run.checkpoints) == [3, 5]
    assert not run.interrupted.exists()
    assert reason in text
    assert "step-5" in text


@pytest.mark.parametrize("synced_after", [6, 7])
def test_a_reference_that_was_not_synced_yet_is_not_continued_from(save, synced_after):
    reference = Reference()
    reference.synced_after = synced_after
    options = ["--grpo.beta", "0.1", "--reference.sync_steps", "7"]
    run, text = save(Policy(7), *options, reference=reference)
    assert (run.checkpoints / "step-7").exists() == (synced_after == 7)
    assert run.interrupted.exists() == ("was not synced" in text) == (synced_after == 6)


def test_a_second_ctrl_c_goes_through(save):
    with pytest.raises(KeyboardInterrupt):
        save(Policy(7, begin_checkpoint=KeyboardInterrupt()))
