"""The section `profile`: which steps, and what cannot be traced."""

import pytest
from config_cases import write_config

from rlsys.config.load import load_config
from rlsys.problems import ProblemsError


def load(tmp_path, *words):
    return load_config(write_config(tmp_path), list(words)).config.profile


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], range(0)),
        (["--profile.steps", "1:2"], range(1, 3)),
        (["--profile.steps", "2"], range(2, 3)),
        (["--profile.steps=1:1"], range(1, 2)),
        (["--profile.steps", "null"], range(0)),
    ],
)
def test_steps_are_the_first_and_the_last(tmp_path, words, steps):
    assert load(tmp_path, *words, "--max_steps", "5").traced == steps


@pytest.mark.parametrize("steps", ["7:5", "0:3", "0", "a", "5:", ":5", "1:2:3", "-1", "1.5"])
def test_what_is_not_a_range_of_steps_is_refused(tmp_path, steps):
    with pytest.raises(ProblemsError, match="write the first and the last step"):
        load(tmp_path, "--profile.steps", steps)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--profile.torch", "policy"], "profile.torch is for the steps of profile.steps"),
        (["--profile.memory"], "profile.memory is for the steps of profile.steps"),
        (["--profile.steps", "9:10", "--max_steps", "5"], "begins after the last step"),
        (
            ["--profile.steps", "1:2", "--profile.memory", "--device", "cpu"],
            "the run is on the CPU: leave it out",
        ),
        (
            ["--profile.steps", "1:2", "--profile.torch", "reference", "--grpo.beta", "0"],
            "the run has no actors of that role; it has policy, rollout",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused(tmp_path, words, says):
    with pytest.raises(ProblemsError) as error:
        load(tmp_path, *words)
    assert says in str(error.value)


def test_roles_are_a_list_with_commas(tmp_path):
    words = ("--profile.steps", "1", "--profile.torch", "policy,rollout")
    assert load(tmp_path, *words).torch == ["policy", "rollout"]
