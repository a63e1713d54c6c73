"""What a run says of its length, and how it ends whose rollouts failed meanwhile."""

from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
from config_cases import values

from rlsys.actors.group import ActorFailure
from rlsys.config import Config
from rlsys.launch import _end_rollouts, step_notes


def end_run(error, unheard):
    with ExitStack() as stack:
        stack.push(partial(_end_rollouts, SimpleNamespace(close=lambda: unheard)))
        if error is not None:
            raise error


def test_what_failed_in_the_background_is_told_before_what_the_driver_stumbled_over():
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


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"max_steps": 10}, []),
        ({"max_steps": 10, "num_train_epochs": 2}, []),  # as a finished run saves it
        (
            {"max_steps": None, "num_train_epochs": 2},
            ["num_train_epochs 2 x 20 prompts / 4 a step = 10 steps"],
        ),
        (
            {"max_steps": 3, "num_train_epochs": 2},
            [
                "note: max_steps = 3 goes before num_train_epochs 2 x 20 prompts / 4 a step = "
                "10 steps"
            ],
        ),
    ],
)
def test_a_run_says_what_its_epochs_come_to(fields, notes):
    assert list(step_notes(Config.model_validate(values(**fields)), 20)) == notes
