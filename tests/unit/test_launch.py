"""How a run ends if its rollouts failed in the background, and what it still saves."""

from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
from config_cases import write_config

from rlsys.actors.reference import ReferenceActors
from rlsys.actors.waiting import ActorFailure
from rlsys.config.load import load_config
from rlsys.file_sums import FileSum
from rlsys.launch import _end_rollouts
from rlsys.system import System


def end_run(error, unheard):
    with ExitStack() as stack:
        stack.push(partial(_end_rollouts, SimpleNamespace(close=lambda: unheard)))
        if error is not None:
            raise error


def test_a_failure_in_the_background_is_raised_before_its_consequences():
    stumbled = TimeoutError("rollout engine 0 did not answer")
    with pytest.raises(ActorFailure, match="device-side assert") as raised:
        end_run(stumbled, ActorFailure("rollout engine 0: device-side assert"))
    assert raised.value.__context__ is stumbled


def test_a_run_that_ended_well_only_notes_what_failed_beyond_its_last_step(capsys):
    end_run(None, ActorFailure("device-side assert"))
    assert "beyond the last step failed: device-side assert" in capsys.readouterr().out


def test_an_interrupt_stays_one():
    with pytest.raises(KeyboardInterrupt):
        end_run(KeyboardInterrupt(), ActorFailure("rollout engine 0 died"))


def test_other_ends_are_left_alone():
    with pytest.raises(ValueError, match="no such file"):
        end_run(ValueError("no such file"), None)


class Model:
    """Writes one file, and notes what it loads."""

    def __init__(self):
        self.loaded = []

    def begin_checkpoint(self, folder):
        (folder / "weights").write_text("7")
        return dict

    def save_model(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    def load_checkpoint(self, folder):
        self.loaded.append(folder)


class Reference(ReferenceActors):
    """Without its actors."""

    def __init__(self, config):
        self.config, self.loaded, self._policy = config, [], None

    def files_from(self, method, folder):
        assert method == "begin_model"
        (folder / "config.json").write_text("{}")
        return lambda: {"config.json": FileSum(2, "")}

    def call_in_turn(self, method, folder):
        self.loaded.append(folder)


class Data:
    """Has seen three prompts per step."""

    state = None

    def state_after(self, step):
        return {"prompts": {"num_taken": 3 * step}}

    def load_state_dict(self, state):
        self.state = state


def system_of(tmp_path, *overrides, reference=None):
    config = load_config(write_config(tmp_path), list(overrides)).config
    return System(config, "cpu", Model(), reference, None, Data(), publisher=None, restarts=None)


def test_a_checkpoint_has_the_policy_and_the_state_of_the_data(tmp_path):
    system = system_of(tmp_path)
    system.begin_checkpoint(tmp_path, 2)()
    assert (tmp_path / "weights").read_text() == "7"
    system.load_checkpoint(tmp_path)
    assert system.policy.loaded == [tmp_path]
    assert system.rollouts.state == {"prompts": {"num_taken": 6}}


def test_a_checkpoint_without_that_state_is_refused_with_the_remedy(tmp_path):
    system = system_of(tmp_path)
    with pytest.raises(ValueError, match=r"no rollouts\.json.*new run from its weights"):
        system.load_checkpoint(tmp_path)


@pytest.mark.parametrize("follows", [True, False])
def test_a_reference_is_a_part_of_the_checkpoint_if_it_changes(tmp_path, follows):
    overrides = ["--grpo.beta", "0.1", *(["--reference.sync_steps", "2"] if follows else [])]
    config = load_config(write_config(tmp_path), overrides).config
    system = system_of(tmp_path, *overrides, reference=Reference(config))
    files = system.begin_checkpoint(tmp_path, 1)()
    assert (tmp_path / "reference" / "config.json").is_file() == follows
    assert files == ({"reference/config.json": FileSum(2, "")} if follows else {})
    system.load_checkpoint(tmp_path)
    assert system.reference.loaded == ([tmp_path / "reference"] if follows else [])
