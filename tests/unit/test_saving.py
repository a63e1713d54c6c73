"""What a run that reached its last step leaves, whatever became of its last checkpoint."""

import errno

import pytest
from config_cases import write_config

from rlsys.config.load import load_config
from rlsys.exit_codes import DISK_FULL, of_error
from rlsys.problems import RunFailed
from rlsys.run.folder import RunDir
from rlsys.run.kept import checkpoint_steps
from rlsys.saving import make_checkpoints, save_final
from rlsys.system import System


class Policy:
    """Writes the last step into each file, and fails to where a test says so."""

    error = None
    step = 0

    def save_model(self, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(self.step))

    def begin_model(self, folder):
        raise AssertionError("no models are kept")

    def begin_checkpoint(self, folder):
        step = self.step

        def await_files():
            if self.error is not None:
                raise self.error
            (folder / "model.safetensors").write_text(str(step))
            return {}

        return await_files


class Rollouts:
    def state_after(self, step):
        return {"after": step}


@pytest.fixture
def train(tmp_path):
    """Trains to the end: `train(*words, fails_at=STEP)` returns run folder, policy, checkpoints."""

    def train(*words, fails_at=None):
        options = ["--max_steps", "4", "--checkpoint.save_steps", "1", *words]
        config = load_config(write_config(tmp_path), options).config
        run, policy = RunDir(tmp_path / "run"), Policy()
        system = System(
            config, "cpu", policy, None, None, Rollouts(), publisher=None, restarts=None
        )
        run.path.mkdir()
        run.metrics.write_text(
            "".join(f'{{"step": {step}, "reward": {step % 3}}}\n' for step in range(1, 5))
        )
        checkpoints = make_checkpoints(system, run)
        for step in range(1, 5):
            policy.step = step
            if step == fails_at:
                policy.error = OSError(errno.ENOSPC, "No space left on device")
            checkpoints.after_step(step)
            checkpoints.finish()
            policy.error = None
        return system, run, checkpoints

    return train


def final(run):
    return (run.final / "model.safetensors").read_text()


def test_the_last_model_is_the_final_one(train, capsys):
    system, run, checkpoints = train()
    save_final(system, run, checkpoints)
    assert final(run) == "4"
    assert f"the trained model is in {run.final}" in capsys.readouterr().out


def test_the_model_of_the_best_checkpoint_is_the_final_one(train, capsys):
    best = ["--checkpoint.metric_for_best_model", "reward", "--checkpoint.load_best_model_at_end"]
    system, run, checkpoints = train(*best)
    assert checkpoint_steps(run.checkpoints) == [2, 3, 4]
    save_final(system, run, checkpoints)
    assert final(run) == "2"
    assert f"model of step 2, the best one, is in {run.final}" in capsys.readouterr().out


def test_a_checkpoint_that_failed_on_the_way_is_no_failure_of_the_run(train, capsys):
    save_final(*train(fails_at=2))
    assert "warning: the checkpoint of step 2 was not saved" in capsys.readouterr().out


def test_the_last_checkpoint_is_tried_again_at_the_end(train, capsys):
    system, run, checkpoints = train(fails_at=4)
    save_final(system, run, checkpoints)
    assert checkpoint_steps(run.checkpoints)[-1] == 4
    assert "warning: the checkpoint of step 4 was not saved" in capsys.readouterr().out


def test_without_its_last_checkpoint_a_run_fails_after_its_model_is_saved(train):
    system, run, checkpoints = train(fails_at=4)
    system.policy.error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(
        RunFailed, match=r"step 4 was not saved.*No space.*step-3\. The trained"
    ) as e:
        save_final(system, run, checkpoints)
    assert final(run) == "4"
    assert of_error(e.value) == DISK_FULL
